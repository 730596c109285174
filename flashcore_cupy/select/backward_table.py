"""The table of the backward kernels: by name, and the tiles of each for heads of some columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from flashcore_cupy.problem.attention_problem import AttentionProblem
from flashcore_cupy.select.config import Tile, rules_of
from flashcore_cupy.select.sm80_backward import Sm80Backward
from flashcore_cupy.select.sm90_backward import Sm90Backward
from flashcore_cupy.select.sm90_wide_backward import Sm90WideBackward

#: Kernels by name, fastest first; "auto" takes the first that can do a problem.
BACKWARD_KERNELS: Mapping[str, type[Sm80Backward]] = {
    "bwd_sm90": Sm90Backward,
    "bwd_sm90_wide": Sm90WideBackward,
    "bwd_sm80": Sm80Backward,
}
_SIXTEEN_BIT = ("float16", "bfloat16")


@dataclass(frozen=True)
class BackwardRow:
    """The tiles of a kernel for heads of up to ``head_dim`` columns.

    A tile's block_m are the rows whose gradients a thread block computes, and its block_n the rows
    of the other side that it takes at a time.
    """

    kernel: str
    head_dim: int
    keys: Tile
    queries: Tile
    dtypes: tuple[str, ...] = _SIXTEEN_BIT
    head_dim_v: int | None = None
    """Columns of v where they differ from those of q and k."""
    score_rules: bool = True
    """False: only where no rule changes scores, for with one the compiler spills."""
    spills_with: tuple[str, ...] = ()
    """As ``Row`` has it."""

    def check(self, problem: AttentionProblem) -> None:
        """Raise ``ValueError`` for rules that its tiles do not hold."""
        changes_scores = any(rule.acts_on == "scores" for rule, _ in problem.rules.given)
        if changes_scores and not self.score_rules:
            raise ValueError("has tiles that hold no rule that changes scores")
        for together in self.spills_with:
            if set(together.split("+")) <= set(rules_of(problem)):
                raise ValueError(f"has tiles that do not hold {together.replace('+', ' and ')}")

    @property
    def dims(self) -> tuple[int, int]:
        """Columns of the tiles of q and k, and of v."""
        return self.head_dim, self.head_dim if self.head_dim_v is None else self.head_dim_v


def _tile(own: int, other: int, warps: int, stages: int = 2) -> Tile:
    return Tile(own, other, warps_m=warps, num_stages=stages, cp_async=True)


def _tma(own: int, other: int, stages: int = 2) -> Tile:
    return Tile(own, other, warps_m=own // 16, num_stages=stages)


_sm80, _sm90 = partial(BackwardRow, "bwd_sm80"), partial(BackwardRow, "bwd_sm90")
_OF_64 = Tile(64, 64, warps_m=12, num_stages=2)
_wide = partial(
    BackwardRow,
    "bwd_sm90_wide",
    keys=_OF_64,
    queries=_OF_64,
    score_rules=False,
    spills_with=("dropout",),
)
_FLOAT32 = ("float32",)
_BIAS_AND_DROPOUT = ("bias+dropout", "bias_fp32+dropout")
# For a head dim between two lines add one; nothing else. The tiles are as large as registers allow;
# of two lines with the same dims the second is for rules that change scores, or for targets with
# less shared memory.
ROWS = (
    _sm90(64, keys=_tma(128, 64), queries=_tma(128, 64)),
    _sm90(96, keys=_tma(128, 64), queries=_tma(128, 64)),
    _sm90(
        128,
        keys=_tma(128, 64),
        queries=_tma(128, 64),
        score_rules=False,
        spills_with=("mask", "mask_mod"),
    ),
    _sm90(128, keys=_tma(64, 64), queries=_tma(128, 64), spills_with=_BIAS_AND_DROPOUT),
    _wide(192, head_dim_v=128),
    _wide(192),
    _wide(256),
    _sm80(32, keys=_tile(128, 32, 4), queries=_tile(128, 32, 4)),
    _sm80(64, keys=_tile(64, 64, 4), queries=_tile(128, 32, 4)),
    _sm80(96, keys=_tile(64, 32, 4), queries=_tile(64, 64, 4)),
    _sm80(128, keys=_tile(64, 32, 4), queries=_tile(64, 64, 4)),
    _sm80(192, keys=_tile(64, 32, 4), queries=_tile(64, 32, 4), head_dim_v=128, score_rules=False),
    _sm80(192, keys=_tile(64, 16, 4), queries=_tile(64, 32, 4), head_dim_v=128),
    _sm80(256, keys=_tile(64, 32, 4), queries=_tile(64, 32, 4)),
    _sm80(256, keys=_tile(64, 16, 4, 1), queries=_tile(64, 16, 4, 1)),
    _sm80(512, keys=_tile(32, 16, 2, 1), queries=_tile(32, 16, 2, 1)),
    _sm80(64, keys=_tile(64, 32, 4), queries=_tile(64, 32, 4), dtypes=_FLOAT32),
    _sm80(128, keys=_tile(64, 32, 4), queries=_tile(64, 32, 4), dtypes=_FLOAT32),
    _sm80(128, keys=_tile(32, 16, 2), queries=_tile(32, 16, 2), dtypes=_FLOAT32),
    _sm80(256, keys=_tile(32, 16, 2, 1), queries=_tile(32, 16, 2, 1), dtypes=_FLOAT32),
)


def rows_of(kernel: str, problem: AttentionProblem) -> list[BackwardRow]:
    """A kernel's narrowest rows that hold a problem's heads; ``ValueError`` if none does."""
    dims = problem.head_dim, problem.head_dim_v
    own = [row for row in ROWS if row.kernel == kernel and problem.dtype in row.dtypes]
    if not own:
        raise ValueError(f"does not take {problem.dtype}")
    wide = [row for row in own if row.dims[0] >= dims[0] and row.dims[1] >= dims[1]]
    if not wide:
        most = max(row.head_dim for row in own)
        asked = "/".join(map(str, dict.fromkeys(dims)))
        raise ValueError(f"takes head dims up to {most} in {problem.dtype}, not {asked}")
    narrowest = min((row.dims for row in wide), key=lambda dims: (sum(dims), dims))
    return [row for row in wide if row.dims == narrowest]
