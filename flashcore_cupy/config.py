"""One kernel's configuration: the row of the table, joined with what the problem fixes.

``KernelConfig.defines()`` is all that a kernel is compiled from; sequence lengths, batch and heads
are not in it, so no kernel is compiled again because one of them changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from flashcore_cupy.params import params_of
from flashcore_cupy.problem import AttentionProblem
from flashcore_cupy.rules import Mods
from flashcore_cupy.tile_checks import SMEM_BYTES, WARPGROUP, illegal, q_stages, staged_cols
from flashcore_cupy.tile_checks import WARP_SIZE as WARP_SIZE
from flashcore_cupy.tile_checks import padded_row as padded_row
from flashcore_cupy.tile_checks import round_up as round_up

_DTYPE_CODE = {"float16": 0, "bfloat16": 1, "float32": 2}
#: What each rule is in ``FC_RULES``; ``kernels/flashcore/rules/score.cuh`` has the same.
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
    "scale_first": 1024,
    "mask_chunks": 2048,
    "softcap_wide": 4096,
}
#: Of float32: scales from here on keep the order of the scores.
_SMALLEST_SCALE = 2.0**-126
#: Softcaps up to here, 50 in Gemma 2, lose 2^-23 of themselves without being wrong about scores.
_USUAL_SOFTCAP = 128.0
_GATE_CODE = {None: 0, "qk": 1, "softmax": 2, "pv": 3}


@dataclass(frozen=True)
class Tile:
    """What a row of the table chooses, and ``--set`` / ``config={...}`` may override."""

    block_m: int
    """Queries per tile (Br)."""
    block_n: int
    """Keys per tile (Bc)."""
    warps_m: int
    """Warps along the queries; wgmma_sm90: beside those of the warpgroup that loads."""
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
    """mma_sm80, wgmma_sm90: the query heads that share a head of K and V are rows of one tile."""
    split_kv: bool = False
    """mma_sm80, wgmma_sm90: several thread blocks may share out the keys."""
    cluster: int = 1
    """wgmma_sm90: so many share them out, and merge through each other's shared memory."""
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
    tma_stores: bool = False
    """wgmma_sm90: whether TMA can address the output."""
    window: bool = False
    """Queries see no key far to the left of their own position; causal: to the right."""
    rules: tuple[str, ...] = ()
    """Names in ``RULE_BITS``."""
    packed: bool = False
    mods: Mods | None = None

    @property
    def num_warps(self) -> int:
        """Warps of a thread block."""
        loading = WARPGROUP if self.uses_tma else 0
        return self.tile.warps_m * self.tile.warps_n * self.tile.warps_d + loading

    @property
    def threads(self) -> int:
        """Threads of a thread block."""
        return self.num_warps * WARP_SIZE

    @property
    def uses_tma(self) -> bool:
        """Whether a warpgroup of its own loads q, k, v, by tensor maps."""
        return self.source == "fwd_sm90.cu"

    @property
    def smem_bytes(self) -> int:
        """Dynamic shared memory of a thread block; the kernel asserts the same size."""
        return SMEM_BYTES[self.source](self)

    @property
    def staged_cols(self) -> int:
        """Columns of O that leave through shared memory, by TMA; the others are stored directly."""
        return staged_cols(self)

    @property
    def softmax_keys(self) -> int:
        """Keys between two updates of a row's running maximum."""
        t = self.tile
        return t.block_n // t.warps_n if self.source == "fwd_sm80.cu" else t.block_n

    @property
    def headers(self) -> tuple[tuple[str, str], ...]:
        """Name and text of the headers that stand in for files of ``kernels/``."""
        return () if self.mods is None else (("flashcore/rules/mods.cuh", self.mods.header()),)

    @property
    def params_bytes(self) -> int:
        """Size of the struct that the kernel takes; the kernel asserts the same size."""
        return int(params_of(self.source).itemsize)

    def defines(self) -> dict[str, int]:
        """The ``-DFC_*`` defines, read by ``kernels/config.cuh``."""
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
            "FC_Q_STAGES": q_stages(self),
            "FC_CP_ASYNC": int(t.cp_async),
            "FC_WARP_SOFTMAX": int(t.warp_softmax),
            "FC_FP8": int(t.fp8),
            "FC_PACK_GQA": int(t.pack_gqa),
            "FC_SPLIT_KV": int(t.split_kv),
            "FC_CLUSTER": t.cluster,
            "FC_CAUSAL": int(self.causal),
            "FC_WINDOW": int(self.window),
            "FC_RULES": sum(RULE_BITS[name] for name in self.rules),
            "FC_VARLEN": int(self.packed),
            "FC_GATE": _GATE_CODE[self.gate],
            "FC_ALIGN_BYTES": self.align_bytes,
            "FC_STAGED_COLS": self.staged_cols,
            "FC_MIN_BLOCKS": t.min_blocks,
            "FC_SMEM_BYTES": self.smem_bytes,
            "FC_PARAMS_BYTES": self.params_bytes,
        }

    def check(self) -> None:
        """Raise ``ValueError`` with the reason if the kernel cannot be built with this tile."""
        for reason in illegal(self):
            raise ValueError(f"config: {reason}")

    def describe(self) -> str:
        """One line for people."""
        t = self.tile
        warps = f"{self.num_warps} warps"
        if self.uses_tma:
            consumers = t.warps_m // WARPGROUP
            warps = f"{consumers} consumer warpgroup{'s' * (consumers > 1)}"
        parts = [f"{t.block_m}x{t.block_n} tile", warps]
        if t.warps_n > 1:
            parts[-1] += f" ({t.warps_m}x{t.warps_n})"
        if t.warps_d > 1:
            parts[-1] += f" ({t.warps_m}x{t.warps_d} on columns)"
        if t.num_stages > 1:
            parts.append(f"{t.num_stages} stages")
        switches = ("cp_async", "warp_softmax", "fp8", "pack_gqa", "split_kv")
        parts += [name for name in switches if getattr(t, name)] + ["TMA"] * self.uses_tma
        parts += [f"cluster of {t.cluster}"] * (t.cluster > 1)
        dims = {self.head_dim, self.head_dim_v}
        parts.append(f"head dim {'/'.join(map(str, sorted(dims)))}")
        parts += self.rules
        if self.uses_tma:
            ways = ["by TMA"] * (self.staged_cols > 0)
            ways += [f"of {self.align_bytes} bytes"] * (self.staged_cols < self.head_dim_v)
            parts.append(f"stores {' and '.join(ways)}")
        else:
            parts.append(f"{self.align_bytes}-byte loads")
        return ", ".join(parts)


#: The quantiser that runs ahead of fp8_wmma: one block per head.
_QUANTIZE_TILE = Tile(16, 16, warps_m=32)


def quantize_config(config: KernelConfig) -> KernelConfig:
    """The quantiser's configuration that goes with an fp8 kernel's."""
    return KernelConfig(
        kernel=config.kernel,
        source="ladder/fp8_quantize.cu",
        dtype=config.dtype,
        head_dim=config.head_dim,
        head_dim_v=config.head_dim_v,
        dim_qk=config.dim_qk,
        dim_v=config.dim_v,
        tile=_QUANTIZE_TILE,
        align_bytes=config.align_bytes,
    )


def check_no_rules(problem: AttentionProblem) -> None:
    """Raise ``ValueError`` that names what a kernel without rules lacks for a problem."""
    asked = [*problem.rules.names]
    asked += ["window"] * (problem.rules.window != (-1, -1)) + ["cu_seqlens"] * problem.packed
    if asked:
        raise ValueError(f"has no {', '.join(asked)}")


def rules_of(problem: AttentionProblem) -> tuple[str, ...]:
    """The names in ``RULE_BITS`` of what a problem asks for."""
    rules, names = problem.rules, {"alibi_slopes": "alibi"}
    found = [names.get(name, name) for name in rules.names]
    if rules.softcap > _USUAL_SOFTCAP and problem.dtype != "float32":
        found[found.index("softcap")] = "softcap_wide"
    if rules.bias is not None:
        if rules.bias.dtype == "float32":
            found[found.index("bias")] = "bias_fp32"
        found += ["bias_pairs"] * rules.bias.pairs
    if rules.mask is not None:
        found += ["mask_chunks"] if rules.mask.chunks else ["mask_pairs"] * rules.mask.pairs
    found += ["scale_first"] * (problem.softmax_scale < _SMALLEST_SCALE)
    return tuple(found)
