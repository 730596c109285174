"""One kernel's configuration: the row of the table, joined with what the problem fixes.

``KernelConfig.defines()`` is all that a kernel is compiled from; sequence lengths, batch and heads
are not in it, so no kernel is compiled again because one of them changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from flashcore_cupy.params import ATTENTION_PARAMS, QUANTIZE_PARAMS
from flashcore_cupy.problem import ITEMSIZE, AttentionProblem
from flashcore_cupy.rules import Mods, Rules

WARP_SIZE = 32
WMMA = 16
"""WMMA fragments are 16 x 16 x 16."""

_DTYPE_CODE = {"float16": 0, "bfloat16": 1, "float32": 2}
#: What each rule is in ``FC_RULES``; ``kernels/flashcore/score.cuh`` has the same.
RULE_BITS = {
    "softcap": 1,
    "alibi": 2,
    "bias": 4,
    "bias_fp32": 8,
    "score_mod": 16,
    "mask": 32,
    "mask_mod": 64,
    "sink": 128,
    "bias_pairs": 256,
    "mask_pairs": 512,
    "negative_scale": 1024,
}
_GATE_CODE = {None: 0, "qk": 1, "softmax": 2, "pv": 3}


@dataclass(frozen=True)
class Tile:
    """What a row of the table chooses, and ``--set`` / ``config={...}`` may override."""

    block_m: int
    """Queries per tile (Br)."""
    block_n: int
    """Keys per tile (Bc)."""
    warps_m: int
    """Warps along the queries."""
    warps_n: int = 1
    """Warps along the keys of S and the columns of O; mma_sm80: with their own m, l and O."""
    warps_d: int = 1
    """mma_sm80: warps along the columns of O, which share the scores of their rows."""
    num_stages: int = 1
    """Tiles of K and V in shared memory at a time."""
    cp_async: bool = False
    """Copies to shared memory that overlap with computation (sm_80 and later)."""
    warp_softmax: bool = False
    """A warp owns its 16 rows: softmax by shuffle, O in registers."""
    fp8: bool = False
    """q, k, v arrive as e4m3 with a scale per head."""
    pack_gqa: bool = False
    """mma_sm80: the query heads that share a head of K and V are rows of one tile."""
    split_kv: bool = False
    """mma_sm80: several thread blocks may share out the keys."""
    min_blocks: int = 1
    """Thread blocks per multiprocessor that registers are kept free for."""

    def override(self, changes: Mapping[str, object]) -> Tile:
        """Change some fields; the changes have passed ``check_overrides``."""
        return replace(self, **changes)  # type: ignore[arg-type]


def check_overrides(changes: object) -> dict[str, int | bool]:
    """Return ``changes`` as a dict; ``ValueError`` names an unknown field or a wrong type."""
    if not isinstance(changes, Mapping):
        raise ValueError(f"config: got {type(changes).__name__}; use a dict, as {{'block_n': 32}}")
    known = {f.name: bool if f.type == "bool" else int for f in fields(Tile)}
    for name, value in changes.items():
        if name not in known:
            raise ValueError(f"config: unknown field {name!r}; choose from {', '.join(known)}")
        if type(value) is not known[name]:
            raise ValueError(f"config: {name}={value!r} is not {known[name].__name__}")
    return dict(changes)


@dataclass(frozen=True)
class KernelConfig:
    """Everything that one compiled kernel depends on."""

    kernel: str
    source: str
    """File in ``kernels/``."""
    dtype: str
    head_dim: int
    """Columns of the tiles of Q and K; those from dim_qk on are zeros."""
    head_dim_v: int
    """Columns of the tiles of V and O; those from dim_v on are zeros."""
    dim_qk: int
    dim_v: int
    tile: Tile
    causal: bool = False
    gate: str | None = None
    align_bytes: int = 16
    window: bool = False
    """Queries see no key far to the left of their own position; causal: to the right."""
    rules: tuple[str, ...] = ()
    """Names in ``RULE_BITS``."""
    packed: bool = False
    mods: Mods | None = None

    @property
    def num_warps(self) -> int:
        """Warps of a thread block."""
        return self.tile.warps_m * self.tile.warps_n * self.tile.warps_d

    @property
    def threads(self) -> int:
        """Threads of a thread block."""
        return self.num_warps * WARP_SIZE

    @property
    def smem_bytes(self) -> int:
        """Dynamic shared memory of a thread block; the kernel asserts the same size."""
        return _SMEM_BYTES[self.source](self)

    @property
    def softmax_keys(self) -> int:
        """Keys between two updates of a row's running maximum."""
        t = self.tile
        return t.block_n // t.warps_n if self.source == "fwd_sm80.cu" else t.block_n

    @property
    def headers(self) -> tuple[tuple[str, str], ...]:
        """Name and text of the headers that stand in for files of ``kernels/``."""
        return () if self.mods is None else (("flashcore/mods.cuh", self.mods.header()),)

    @property
    def params_bytes(self) -> int:
        """Size of the struct that the kernel takes; the kernel asserts the same size."""
        dtype = QUANTIZE_PARAMS if self.source == "fp8_quantize.cu" else ATTENTION_PARAMS
        return int(dtype.itemsize)

    def defines(self) -> dict[str, int]:
        """The ``-DFC_*`` defines, read by ``kernels/flashcore/config.cuh``."""
        t = self.tile
        return {
            "FC_DTYPE": _DTYPE_CODE[self.dtype],
            "FC_DIM_QK": self.dim_qk,
            "FC_DIM_V": self.dim_v,
            "FC_HEAD_DIM": self.head_dim,
            "FC_HEAD_DIM_V": self.head_dim_v,
            "FC_BLOCK_M": t.block_m,
            "FC_BLOCK_N": t.block_n,
            "FC_WARPS_M": t.warps_m,
            "FC_WARPS_N": t.warps_n,
            "FC_WARPS_D": t.warps_d,
            "FC_NUM_STAGES": t.num_stages,
            "FC_CP_ASYNC": int(t.cp_async),
            "FC_WARP_SOFTMAX": int(t.warp_softmax),
            "FC_FP8": int(t.fp8),
            "FC_PACK_GQA": int(t.pack_gqa),
            "FC_SPLIT_KV": int(t.split_kv),
            "FC_CAUSAL": int(self.causal),
            "FC_WINDOW": int(self.window),
            "FC_RULES": sum(RULE_BITS[name] for name in self.rules),
            "FC_VARLEN": int(self.packed),
            "FC_GATE": _GATE_CODE[self.gate],
            "FC_ALIGN_BYTES": self.align_bytes,
            "FC_MIN_BLOCKS": t.min_blocks,
            "FC_SMEM_BYTES": self.smem_bytes,
            "FC_PARAMS_BYTES": self.params_bytes,
        }

    def check(self) -> None:
        """Raise ``ValueError`` with the reason if the kernel cannot be built with this tile."""
        for reason in _illegal(self):
            raise ValueError(f"config: {reason}")

    def describe(self) -> str:
        """One line for people."""
        t = self.tile
        parts = [f"{t.block_m}x{t.block_n} tile", f"{self.num_warps} warps"]
        if t.warps_n > 1:
            parts[-1] += f" ({t.warps_m}x{t.warps_n})"
        if t.warps_d > 1:
            parts[-1] += f" ({t.warps_m}x{t.warps_d} on columns)"
        if t.num_stages > 1:
            parts.append(f"{t.num_stages} stages")
        switches = ("cp_async", "warp_softmax", "fp8", "pack_gqa", "split_kv")
        parts += [name for name in switches if getattr(t, name)]
        dims = {self.head_dim, self.head_dim_v}
        parts.append(f"head dim {'/'.join(map(str, sorted(dims)))}")
        parts += self.rules
        parts.append(f"{self.align_bytes}-byte loads")
        return ", ".join(parts)


def _illegal(c: KernelConfig) -> list[str]:
    """Why a tile does not fit its kernel, most basic reason first."""
    t, source = c.tile, c.source
    sizes = {
        n: getattr(t, n)
        for n in [
            *("block_m", "block_n", "warps_m", "warps_n", "warps_d", "num_stages", "min_blocks")
        ]
    }
    reasons = [f"{name}={value} is not positive" for name, value in sizes.items() if value < 1]
    if reasons:
        return reasons
    if c.threads > 1024:
        reasons.append(f"warps_m x warps_n = {c.num_warps} warps; a thread block holds at most 32")
    if source != "fwd_sm80.cu" and (t.warps_d > 1 or t.pack_gqa or t.split_kv):
        reasons.append("warps_d, pack_gqa and split_kv are mma_sm80's")
    if source == "scalar.cu":
        if t.block_n != WARP_SIZE:
            reasons.append(
                f"block_n={t.block_n}; scalar gives each of 32 lanes one key: block_n=32"
            )
        if t.block_m % c.num_warps:
            reasons.append(f"block_m={t.block_m} is not a multiple of the {c.num_warps} warps")
        if t.num_stages != 1 or t.cp_async or t.warp_softmax or t.fp8:
            reasons.append("scalar has one stage and none of cp_async, warp_softmax, fp8")
        return reasons
    if t.block_m % (WMMA * t.warps_m):
        reasons.append(f"block_m={t.block_m} is not a multiple of 16 x warps_m = {16 * t.warps_m}")
    if t.block_n % (WMMA * t.warps_n):
        reasons.append(f"block_n={t.block_n} is not a multiple of 16 x warps_n = {16 * t.warps_n}")
    if source == "wmma_unfused.cu":
        if t.num_stages != 2 or t.warp_softmax or t.fp8:
            reasons.append("wmma_unfused has num_stages=2 and neither warp_softmax nor fp8")
        return reasons
    if source == "fwd_sm80.cu":
        return reasons + _illegal_sm80(c)
    if t.num_stages not in (1, 2):
        reasons.append(f"num_stages={t.num_stages}; one stage, or two in turn")
    if t.warp_softmax:
        if t.warps_n != 1 or t.block_m != WMMA * t.warps_m:
            reasons.append("warp_softmax: a warp owns 16 whole rows: warps_n=1, block_m=16*warps_m")
        if 2 * t.block_m > 2 * t.num_stages * t.block_n:
            reasons.append(
                "warp_softmax: O leaves through K and V: block_m <= num_stages * block_n"
            )
    elif c.threads % t.block_m or c.threads // t.block_m not in (1, 2, 4, 8, 16, 32):
        reasons.append(
            f"{c.threads} threads do not divide evenly among block_m={t.block_m} softmax rows"
        )
    elif t.block_n % (c.threads // t.block_m):
        reasons.append(f"block_n={t.block_n} is not a multiple of the threads of a softmax row")
    if t.fp8 and not t.warp_softmax:
        reasons.append("fp8 goes with warp_softmax")
    if t.fp8 and t.cp_async:
        reasons.append("fp8 widens on load, so its copies cannot be asynchronous: cp_async=False")
    return reasons


def _illegal_sm80(c: KernelConfig) -> list[str]:
    t, size = c.tile, ITEMSIZE[c.dtype]
    reasons = []
    if t.num_stages not in (1, 2):
        reasons.append(f"num_stages={t.num_stages}; one stage, or two in turn")
    if not t.cp_async or t.warp_softmax or t.fp8:
        reasons.append("mma_sm80 has cp_async and neither warp_softmax nor fp8")
    if t.block_n % (WMMA * t.warps_n * t.warps_d) or c.head_dim_v % (WMMA * t.warps_d):
        reasons.append(f"warps_d={t.warps_d}: keys and columns do not divide into steps of 16")
    alone = t.warps_n == 1 and t.num_stages == 1 and not t.split_kv and size == 2
    if t.warps_d > 1 and not alone:
        reasons.append("warps_d: with 16-bit inputs, one stage, and neither warps_n nor split_kv")
    if size == 4 and t.block_n // t.warps_n > 64:
        reasons.append(f"block_n={t.block_n}: a warp takes at most 64 keys of float32")
    merged = (t.warps_n - 1) * 32 * (t.block_m // 16) * (4 + c.head_dim_v // t.warps_d // 2) * 4
    if merged > t.num_stages * t.block_n * (
        _row_bytes(c, c.head_dim) + _row_bytes(c, c.head_dim_v)
    ):
        reasons.append(f"warps_n={t.warps_n}: their results do not fit over K and V for the merge")
    return reasons


#: The quantiser that runs ahead of fp8_wmma: one block per head.
_QUANTIZE_TILE = Tile(16, 16, warps_m=32)


def quantize_config(config: KernelConfig) -> KernelConfig:
    """The quantiser's configuration that goes with an fp8 kernel's."""
    return KernelConfig(
        kernel=config.kernel,
        source="fp8_quantize.cu",
        dtype=config.dtype,
        head_dim=config.head_dim,
        head_dim_v=config.head_dim_v,
        dim_qk=config.dim_qk,
        dim_v=config.dim_v,
        tile=_QUANTIZE_TILE,
        align_bytes=config.align_bytes,
    )


def check_no_rules(problem: AttentionProblem) -> None:
    """Raise ``ValueError`` that names what a kernel without rules lacks for the problem."""
    asked = [*problem.rules.names]
    asked += ["window"] * (problem.rules.window != (-1, -1)) + ["cu_seqlens"] * problem.packed
    if asked:
        raise ValueError(f"has no {', '.join(asked)}")


def rules_of(rules: Rules) -> tuple[str, ...]:
    """The names in ``RULE_BITS`` of what a problem asks for."""
    names = {"alibi_slopes": "alibi"}
    found = [names.get(name, name) for name in rules.names]
    if rules.bias is not None:
        if rules.bias.dtype == "float32":
            found[found.index("bias")] = "bias_fp32"
        found += ["bias_pairs"] * rules.bias.pairs
    if rules.mask is not None:
        found += ["mask_pairs"] * rules.mask.pairs
    return tuple(found)


def padded_row(columns: int) -> int:
    """Elements between rows of a shared tile; see ``padded_row`` in ``smem_tile.cuh``."""
    return columns + 8


def round_up(n: int, multiple: int) -> int:
    """The next multiple of ``multiple``, or ``n`` itself."""
    return -(-n // multiple) * multiple


def _scalar_smem(c: KernelConfig) -> int:
    t = c.tile
    return 4 * (t.block_m * c.dim_qk + t.block_n * (c.dim_qk | 1) + t.block_n * c.dim_v)


def _unfused_smem(c: KernelConfig) -> int:
    t, ld, size = c.tile, padded_row(c.head_dim), ITEMSIZE[c.dtype]
    scores = size * (t.block_m + t.block_n) * ld
    stage = size * (t.block_m * padded_row(t.block_n) + t.block_n * ld)
    output = t.num_stages * stage + 4 * t.block_m * ld + 4 * t.block_m
    return round_up(max(scores, output), 128)


def _fused_smem(c: KernelConfig) -> int:
    t, ld, size = c.tile, padded_row(c.head_dim), ITEMSIZE[c.dtype]
    ld_s = padded_row(t.block_n)
    total = size * ld * (t.block_m + 2 * t.num_stages * t.block_n)  # Q, K, V
    total += 4 * t.block_m * ld_s  # S, and P over it
    if not t.warp_softmax:
        total += 4 * t.block_m * ld  # O
        total += 4 * t.block_m * (c.threads // t.block_m)  # partial maxima and sums
    return round_up(total + 4 * t.block_m, 128)


def _row_bytes(c: KernelConfig, columns: int) -> int:
    """A shared row of fwd_sm80: swizzled, or padded; see ``shared_layout.cuh``."""
    swizzled = ITEMSIZE[c.dtype] == 2 and columns % 32 == 0
    return columns * ITEMSIZE[c.dtype] + (0 if swizzled else 16)


_WORK_BYTES = 64
"""``Work`` in ``schedule.cuh``, and two pointers."""


def _sm80_smem(c: KernelConfig) -> int:
    t = c.tile
    row, row_v = _row_bytes(c, c.head_dim), _row_bytes(c, c.head_dim_v)
    total = t.block_m * max(row, row_v) + t.num_stages * t.block_n * (row + row_v)
    if t.warps_d > 1:
        total += t.block_m * _row_bytes(c, t.block_n) + 4 * t.warps_d * t.block_m
    if "mask" in c.rules or "mask_mod" in c.rules:
        total += 4 * c.num_warps * -(-t.block_n // (t.warps_n * t.warps_d) // 32)
    return round_up(total + _WORK_BYTES, 128)


def _quantize_smem(c: KernelConfig) -> int:
    return 4 * c.num_warps


_SMEM_BYTES = {
    "scalar.cu": _scalar_smem,
    "wmma_unfused.cu": _unfused_smem,
    "wmma_fused.cu": _fused_smem,
    "fwd_sm80.cu": _sm80_smem,
    "fp8_quantize.cu": _quantize_smem,
}
