"""What a row of the tile table says: a tile, and the problems that it is meant for."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from flashcore_cupy.problem.attention_problem import AttentionProblem
from flashcore_cupy.problem.rules import RULES
from flashcore_cupy.select.config import Tile, rules_of

# Of an H100 or H200 with SXM. A row is chosen for a target, whichever GPU of it there is, so that a
# machine without one builds the same kernels.
_MULTIPROCESSORS = 132
#: What is evaluated score by score, as ``RULE_BITS`` names it.
PER_SCORE = (
    *(
        name
        for rule in RULES
        if rule.acts_on in ("scores", "keys", "probabilities")
        for name in rule.codes
    ),
    "scale_first",
)


@dataclass(frozen=True)
class Row:
    """A tile, for heads of up to ``head_dim`` columns, and the problems that it is meant for."""

    kernel: str
    head_dim: int
    tile: Tile
    _: KW_ONLY
    max_blocks: int | None = None
    """Only for grids that would hold at most this many blocks of 128 queries."""
    max_keys: int | None = None
    """Only for at most this many keys."""
    max_rows: int | None = None
    """Only where a head of K and V meets at most this many rows: queries times grouped heads."""
    min_group: int = 1
    """Only where at least so many heads of q share a head of k and v."""
    max_heads_kv: int | None = None
    """Only for at most this many heads of k and v, those of all batches together; never packed."""
    max_head_keys: int | None = None
    """Only for at most this many keys in all these heads together; never packed."""
    above_blocks: int | None = None
    """The opposite of max_blocks: for auto, only grids of more than this."""
    above_rows: int | None = None
    """The opposite of max_rows."""
    round_cost: float | None = None
    """Time of a round of thread blocks, one per multiprocessor, relative to the head dim's other
    rows. Of all rows that are meant for a problem, the one whose rounds take least in all is first.
    """
    max_arch: int | None = None
    """Only up to this compute capability: for newer ones the compiler spills."""
    min_arch: int | None = None
    """Only from this compute capability on."""
    head_dim_v: int | None = None
    """Columns of v where they differ from those of q and k."""
    dtypes: tuple[str, ...] = ("float16", "bfloat16")
    spills_with: tuple[str, ...] = ()
    """Only without these rules: the compiler spills with them. "a+b" is both together. Named as in
    ``RULE_BITS``; "causal" is any right side of a window, "window" any left one."""

    @property
    def dims(self) -> tuple[int, int]:
        """Columns of the tiles of q and k, and of v."""
        return self.head_dim, self.head_dim if self.head_dim_v is None else self.head_dim_v

    @property
    def sizes(self) -> tuple[object, ...]:
        """The limits on a problem's sizes, and for ``round_cost`` the queries of a block.

        Of two rows with the same sizes and dims the second is only taken where the first cannot be:
        both make the same grid, and the first costs no more.
        """
        rounds_of = None if self.round_cost is None else self.tile.block_m
        few = (self.max_blocks, self.max_keys, self.max_rows, self.min_group)
        heads = (self.max_heads_kv, self.max_head_keys)
        return (*few, *heads, self.above_blocks, self.above_rows, rounds_of)

    def serves(self, problem: AttentionProblem) -> bool:
        """Whether the row is meant for a problem of this kind, and is not too large for it."""
        if problem.dtype not in self.dtypes or not self.takes_rules(problem):
            return False
        if problem.heads_q // problem.heads_kv < self.min_group:
            return False
        limits = (self.max_blocks, self.max_keys, self.max_rows)
        if all(limit is None for limit in (*limits, self.max_heads_kv, self.max_head_keys)):
            return True
        if problem.batch_invariant:  # the same tile, whatever else is in the batch
            return False
        few_blocks = self.max_blocks is None or _blocks(problem) <= self.max_blocks
        few_keys = self.max_keys is None or problem.seqlen_kv <= self.max_keys
        few_rows = self.max_rows is None or _rows(problem) <= self.max_rows
        return few_blocks and few_keys and few_rows and self._has_few_heads(problem)

    def _has_few_heads(self, problem: AttentionProblem) -> bool:
        if self.max_heads_kv is None and self.max_head_keys is None:
            return True
        heads = problem.batch * problem.heads_kv
        few_heads = self.max_heads_kv is None or heads <= self.max_heads_kv
        few_keys = self.max_head_keys is None or heads * problem.seqlen_kv <= self.max_head_keys
        return few_heads and few_keys and not problem.packed

    def takes_rules(self, problem: AttentionProblem) -> bool:
        """Whether the row's registers hold the problem's rules, too, and its rows share keys."""
        if self.tile.pack_gqa and problem.rules.differ_by_head:
            return False  # a key that one head of the group does not see must not reach it
        asked = set(rules_of(problem))
        left, right = problem.window
        asked |= {"window"} if left >= 0 else set()
        asked |= {"causal"} if right >= 0 else set()  # a window's right side is built alike
        return not any(asked.issuperset(rules.split("+")) for rules in self.spills_with)

    def unfilled_by(self, problem: AttentionProblem) -> str:
        """Why the problem is smaller than the row takes it to be; empty if it is not."""
        if problem.batch_invariant:  # the same tile, whatever else is in the batch
            return ""
        if self.above_rows is not None and _rows(problem) <= self.above_rows:
            return "is for more queries per head of k and v"
        if self.above_blocks is not None and _blocks(problem) <= self.above_blocks:
            return "is for larger grids"
        return ""

    def grid_cost(self, problem: AttentionProblem) -> float:
        """What the problem's thread blocks take, in ``round_cost``'s unit; 0 if it has none."""
        if self.round_cost is None or problem.batch_invariant:
            return 0.0
        blocks = _blocks(problem, self.tile.block_m)
        return self.round_cost * -(-blocks // _MULTIPROCESSORS)


def _blocks(problem: AttentionProblem, block_m: int = 128) -> int:
    """Thread blocks of a grid of blocks of so many queries."""
    sequences = 1 if problem.packed else problem.batch
    return sequences * problem.heads_q * -(-problem.seqlen_q // block_m)


def _rows(problem: AttentionProblem) -> int:
    """Rows that meet a head of K and V: queries times grouped heads.

    Packed: of a sequence of average length, for only the device knows the lengths.
    """
    queries = problem.seqlen_q
    if problem.packed:
        queries = -(-queries // max(1, problem.batch))
    return problem.heads_q // problem.heads_kv * queries
