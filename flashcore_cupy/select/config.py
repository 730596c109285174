"""One kernel's configuration: the row of the table, joined with what the problem fixes.

``KernelConfig.defines()`` is all that a kernel is compiled from; sequence lengths, batch and heads
are not in it, so no kernel is compiled again because one of them changed.

A family of kernels is a subclass: ``ladder.py``, ``sm80.py`` and ``sm90.py`` have one each, or a
few. It answers whatever differs between kernels, so that nobody else compares their names.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import numpy as np

from flashcore_cupy.problem.attention_problem import AttentionProblem, Operand
from flashcore_cupy.problem.mods import Mods
from flashcore_cupy.problem.rules import NO_WINDOW, RULE_BITS, RULES
from flashcore_cupy.select.params import ATTENTION_PARAMS
from flashcore_cupy.select.tensor_view import View
from flashcore_cupy.select.units import MAX_GRID, MMA, WARP_SIZE

_DTYPE_CODE = {"float16": 0, "bfloat16": 1, "float32": 2}
_GATE_CODE = {None: 0, "qk": 1, "softmax": 2, "pv": 3, "dp": 4, "ds": 5}
_HIDING = {name for rule in RULES if rule.acts_on == "keys" for name in rule.codes}
#: Of float32: scales from here on keep the order of the scores.
_SMALLEST_SCALE = 2.0**-126

Scratch = Mapping[str, tuple[tuple[int, ...], str]]
"""Shapes and dtypes of arrays, by name."""


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
    """mma_sm80, wgmma_sm90: the keys may be split over several thread blocks."""
    cluster: int = 1
    """wgmma_sm90: thread blocks that combine splits through each other's shared memory."""
    one_tile: bool = False
    """cluster_sm90: no warpgroup has more than one tile of keys, so there is no loop over them."""
    alone: bool = False
    """cluster_sm90: no other thread block runs beside one on its multiprocessor, for it takes more
    than half of the shared memory."""
    own_lists: bool = False
    """mma_sm80, wgmma_sm90: a launch ahead asks mask_mod, and lists blocks; see own_lists.py."""
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


def rules_of(problem: AttentionProblem) -> tuple[str, ...]:
    """The names in ``RULE_BITS`` of what a problem asks for."""
    scale_first = ("scale_first",) * (problem.softmax_scale < _SMALLEST_SCALE)
    return problem.rules.bits(problem.dtype) + scale_first


@dataclass(frozen=True)
class KernelConfig(ABC):
    """Everything that one compiled kernel depends on. A subclass is a family of kernels."""

    source: ClassVar[str]
    """File in ``kernels/``."""
    entries: ClassVar[tuple[str, ...]]
    """Entry points, in launch order; the last writes the output."""
    params: ClassVar[np.dtype[Any]] = ATTENTION_PARAMS
    """The struct that they take."""
    has_rules: ClassVar[bool] = False
    """Windows, score rules, masks, sinks, packed batches; the others are causal or not."""
    takes_packed: ClassVar[bool] = False
    """Batches of sequences of any lengths, side by side."""
    overlaps_launches: ClassVar[bool] = False
    """Waits for the launch before it by itself, so that it may begin before that one has ended."""
    quantizes: ClassVar[bool] = False
    """Rounds its inputs to fp8 first, so ``auto`` never takes it."""
    own_switches: ClassVar[tuple[str, ...]] = ()
    """Which of ``one_tile``, ``alone`` and ``own_lists`` its tiles may have."""
    row_align: ClassVar[int] = 1
    """Every row of q, k and v starts and ends on a multiple of so many bytes."""
    mask_keys: ClassVar[int] = 1
    """Keys of a mask that are read at a time; its rows are whole multiples."""

    kernel: str
    dtype: str
    head_dim: int
    """Columns of the tiles of Q and K; those from dim_qk on are zeros."""
    head_dim_v: int
    """Columns of the tiles of V and O; those from dim_v on are zeros."""
    dim_qk: int
    dim_v: int
    tile: Tile
    bounded_right: bool = False
    """Queries see no key too far to the right of their own position: causal, or a window."""
    bounded_left: bool = False
    """Nor one too far to the left: a window."""
    gate: str | None = None
    align_bytes: int = 16
    rules: tuple[str, ...] = ()
    """Names in ``RULE_BITS``."""
    packed: bool = False
    mods: Mods | None = None

    # --- which problems and targets ---------------------------------------------------------------

    @classmethod
    def why_not_on(cls, arch: str) -> str | None:
        """Why a target lacks what every kernel of the family needs; None if it does not."""
        return None

    @classmethod
    def check_problem(cls, problem: AttentionProblem) -> None:
        """Raise ``ValueError`` that names what the family lacks for a problem."""
        if cls.has_rules:
            return
        asked = [*problem.rules.names]
        asked += ["window"] * (problem.rules.window != NO_WINDOW)
        asked += ["cu_seqlens"] * problem.packed
        if asked:
            raise ValueError(f"has no {', '.join(asked)}")

    @classmethod
    def is_meant_for(cls, problem: AttentionProblem) -> bool:
        """Whether "auto" tries it: whether the problem has the size that the family is for."""
        return True

    @classmethod
    def why_slow(cls, problem: AttentionProblem) -> str | None:
        """Why "auto" does better with the next kernel; None if it does not."""
        return None

    @classmethod
    def of(
        cls, kernel: str, dims: tuple[int, int], tile: Tile, problem: AttentionProblem
    ) -> KernelConfig:
        """Join a kernel's name and its tiles with a problem."""
        left, right = problem.window
        return cls(
            kernel=kernel,
            dtype=problem.dtype,
            head_dim=dims[0],
            head_dim_v=dims[1],
            dim_qk=problem.head_dim,
            dim_v=problem.head_dim_v,
            tile=tile,
            bounded_right=right >= 0,
            bounded_left=left >= 0,
            gate=problem.gate,
            align_bytes=problem.align_bytes,
            rules=rules_of(problem) if cls.has_rules else (),
            packed=problem.packed,
            mods=problem.rules.mods,
        )

    def stored_to(self, output: Operand) -> KernelConfig:
        """Loads of q, k, v and stores of o share one width: a less aligned output sets it."""
        return replace(self, align_bytes=min(self.align_bytes, output.align_bytes))

    def check(self) -> None:
        """Raise ``ValueError`` with the reason if the kernel cannot be built with this tile."""
        for reason in self.illegal():
            raise ValueError(f"config: {reason}")

    def check_heads(self, problem: AttentionProblem) -> None:
        """Raise ``ValueError`` if the tile cannot hold a problem's heads side by side."""
        if self.tile.pack_gqa and problem.rules.differ_by_head:
            raise ValueError(
                "config: pack_gqa with a rule that hides or drops keys of some heads of a group"
            )

    # --- what is compiled -------------------------------------------------------------------------

    def illegal(self) -> list[str]:
        """Why a tile does not fit its kernel, most basic reason first."""
        sizes = {f.name: getattr(self.tile, f.name) for f in fields(Tile) if f.type == "int"}
        reasons = [f"{name}={value} is not positive" for name, value in sizes.items() if value < 1]
        if reasons:
            return reasons
        if self.threads > 1024:
            reasons.append(
                f"warps_m x warps_n = {self.num_warps} warps; a thread block holds at most 32"
            )
        others = {"one_tile", "alone", "own_lists"}.difference(self.own_switches)
        reasons += [f"{self.kernel} has no {n}" for n in sorted(others) if getattr(self.tile, n)]
        return reasons + self.unfit()

    @abstractmethod
    def unfit(self) -> list[str]:
        """The family's own reasons against a tile whose sizes are positive."""

    def uncut(self) -> list[str]:
        """Why the tile's warps do not get whole fragments."""
        reasons = []
        for block, warps in (("block_m", "warps_m"), ("block_n", "warps_n")):
            size, step = getattr(self.tile, block), MMA * getattr(self.tile, warps)
            if size % step:
                reasons.append(f"{block}={size} is not a multiple of 16 x {warps} = {step}")
        return reasons

    @property
    @abstractmethod
    def smem_bytes(self) -> int:
        """Dynamic shared memory of a thread block; the kernel asserts the same size."""

    @property
    def num_warps(self) -> int:
        """Warps of a thread block."""
        return self.tile.warps_m * self.tile.warps_n * self.tile.warps_d

    @property
    def threads(self) -> int:
        """Threads of a thread block."""
        return self.num_warps * WARP_SIZE

    @property
    def hides_keys(self) -> bool:
        """Whether its rules hide keys one by one, so that warps note which keys they see."""
        return not _HIDING.isdisjoint(self.rules)

    @property
    def softmax_keys(self) -> int:
        """Keys between two updates of a row's running maximum."""
        return self.tile.block_n

    @property
    def headers(self) -> tuple[tuple[str, str], ...]:
        """Name and text of the headers that stand in for files of ``kernels/``."""
        return () if self.mods is None else (("flashcore/rules/mods.cuh", self.mods.header()),)

    @property
    def params_bytes(self) -> int:
        """Size of the struct that the kernel takes; the kernel asserts the same size."""
        return int(self.params.itemsize)

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
            "FC_Q_STAGES": 1,
            "FC_CP_ASYNC": int(t.cp_async),
            "FC_WARP_SOFTMAX": int(t.warp_softmax),
            "FC_FP8": int(t.fp8),
            "FC_PACK_GQA": int(t.pack_gqa),
            "FC_SPLIT_KV": int(t.split_kv),
            "FC_CLUSTER": t.cluster,
            "FC_ONE_TILE": int(t.one_tile),
            "FC_ALONE": int(t.alone),
            "FC_BOUNDED_RIGHT": int(self.bounded_right),
            "FC_BOUNDED_LEFT": int(self.bounded_left),
            "FC_RULES": sum(RULE_BITS[name] for name in self.rules),
            "FC_VARLEN": int(self.packed),
            "FC_GATE": _GATE_CODE[self.gate],
            "FC_ALIGN_BYTES": self.align_bytes,
            "FC_STAGED_COLS": 0,
            "FC_OWNS_KEYS": 0,
            "FC_GRADIENT_COLS": 0,
            "FC_FP32_GRADIENTS": 0,
            "FC_ACCUMULATES": 0,
            "FC_SUMS_DISTANCES": 0,
            "FC_ADDS_DQ": 0,
            "FC_ORDERED": 0,
            "FC_MIN_BLOCKS": t.min_blocks,
            "FC_SMEM_BYTES": self.smem_bytes,
            "FC_PARAMS_BYTES": self.params_bytes,
            **self.own_defines(),
        }

    def own_defines(self) -> dict[str, int]:
        """What the family's kernels are told besides; replaces those of the same name."""
        return {}

    # --- what is launched -------------------------------------------------------------------------

    def before(self) -> tuple[KernelConfig, ...]:
        """What is launched ahead of the kernel."""
        return ()

    def grids(self, problem: AttentionProblem, blocks: int) -> tuple[int, ...]:
        """Thread blocks of each entry point, where the last has ``blocks``; 0: no launch."""
        return (blocks,)

    def splits(self, problem: AttentionProblem, resident: int) -> int:
        """Ranges into which the keys of a block of rows are split, one thread block each.

        ``resident``: the thread blocks that run side by side on the whole GPU.
        """
        return 1

    def section(self, problem: AttentionProblem, multiprocessors: int) -> int:
        """Heads whose blocks of rows are interleaved, the longest first."""
        return 1

    def most_blocks(self, multiprocessors: int) -> int:
        """Thread blocks of a launch at most; a persistent kernel gives each of them more work."""
        return MAX_GRID

    def workspace_bytes(self, blocks: int, splits: int, most_blocks: int) -> tuple[int, int]:
        """Bytes of partials and of counters that a launch needs, (0, 0) if none.

        ``blocks``: blocks of rows, each of which has ``splits`` splits of the keys.
        """
        return 0, 0

    def scratch(self, problem: AttentionProblem) -> Scratch:
        """Arrays that the launches of a problem leave for each other."""
        return {}

    def views(self, problem: AttentionProblem, output: Operand) -> tuple[View, ...]:
        """What the struct's tensor maps are told of q, k, v and o; a kernel without has none."""
        return ()

    def bind(
        self, params: np.ndarray[Any, Any], problem: AttentionProblem, addresses: Mapping[str, int]
    ) -> None:
        """Write into the struct what depends on the addresses of arrays, scratch among them."""
        for name in self.scratch(problem):
            params[name] = addresses[name]

    # --- for people -------------------------------------------------------------------------------

    def describe(self) -> str:
        """One line for people."""
        t = self.tile
        parts = [f"{t.block_m}x{t.block_n} tile", self.describe_warps()]
        if t.num_stages > 1:
            parts.append(f"{t.num_stages} stages")
        parts += [name for name in SWITCHES if getattr(t, name)] + self.describe_units()
        parts += [f"cluster of {t.cluster}"] * (t.cluster > 1)
        dims = {self.head_dim, self.head_dim_v}
        parts.append(f"head dim {'/'.join(map(str, sorted(dims)))}")
        return ", ".join([*parts, *self.rules, self.describe_accesses()])

    def describe_warps(self) -> str:
        """Who works on a tile."""
        t = self.tile
        found = f"{self.num_warps} warps"
        found += f" ({t.warps_m}x{t.warps_n})" * (t.warps_n > 1)
        return found + f" ({t.warps_m}x{t.warps_d} on columns)" * (t.warps_d > 1)

    def describe_units(self) -> list[str]:
        """What of the hardware it uses that the tile does not say."""
        return []

    def describe_accesses(self) -> str:
        """How wide loads and stores are."""
        return f"{self.align_bytes}-byte loads"


#: The fields of a tile that are on or off.
SWITCHES = tuple(f.name for f in fields(Tile) if f.type == "bool")
