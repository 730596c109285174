"""One case of the correctness matrix: a problem, its rules, and how its arrays lie in memory.

A case is a handful of words, so that it can be drawn, compared and printed; its arrays follow from
its seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import ml_dtypes
import numpy as np

from flashcore_cupy.cpu.reference import InputKind
from flashcore_cupy.problem.attention_problem import (
    AttentionProblem,
    Causal,
    Gate,
    Layout,
    contiguous_problem,
)
from flashcore_cupy.problem.block_lists import packed as packed_lists
from flashcore_cupy.problem.block_mask import BlockMask
from flashcore_cupy.problem.blocks import Array
from flashcore_cupy.problem.gradients import INPUTS, BackwardGate
from flashcore_cupy.problem.listed_blocks import FULL, LISTS, MIXED, Lists, blocks_of
from flashcore_cupy.problem.rules import NO_RULES, RULES, Rules
from flashcore_cupy.select.backward_table import BACKWARD_KERNELS

View = Literal["contiguous", "strided", "align8", "align4", "misaligned", "transposed"]

Choice = dict[str, Any]
"""Some fields of a case."""


@dataclass(frozen=True)
class Mod:
    """A score_mod or a mask_mod, the same for kernels and for NumPy; ``args`` in _MOD_ARRAYS."""

    cuda: str
    python: Callable[..., Any]
    args: tuple[str, ...] = ()


SCORE_MODS = {
    "table": Mod(
        "0.875f * score + table[(q_idx + 3 * kv_idx + h) % 64]",
        lambda score, b, h, q_idx, kv_idx, *, table, **_: (
            score * score.dtype.type(0.875) + table[(q_idx + 3 * kv_idx + h) % 64]
        ),
        ("table",),
    ),
    "halves": Mod(
        "score + halves[(kv_idx + b) % 16]",
        lambda score, b, h, q_idx, kv_idx, *, halves, **_: (
            score + halves[(kv_idx + b) % 16].astype(score.dtype)
        ),
        ("halves",),
    ),
}
MASK_MODS = {
    "thirds": Mod(
        "(kv_idx + q_idx + b) % 3 != 0",
        lambda b, h, q_idx, kv_idx, **_: (kv_idx + q_idx + b) % 3 != 0,
    ),
    "blocks": Mod(
        "(kv_idx / 64 + q_idx / 64 + h) % 2 == 0",
        lambda b, h, q_idx, kv_idx, **_: (kv_idx // 64 + q_idx // 64 + h) % 2 == 0,
    ),
    "allowed": Mod(
        "allowed[(kv_idx + h) % 16]",
        lambda b, h, q_idx, kv_idx, *, allowed, **_: allowed[(kv_idx + h) % 16],
        ("allowed",),
    ),
}
_MOD_ARRAYS: Mapping[str, Callable[[np.random.Generator], Array]] = {
    "table": lambda rng: rng.standard_normal(64).astype(np.float32),
    "halves": lambda rng: rng.standard_normal(16).astype(np.float16),
    "allowed": lambda rng: np.arange(16) != rng.integers(16),
}

# What is tried of every rule, with and without a gate. {}: without the rule.
SCORES: tuple[Choice, ...] = (
    {},
    {"softcap": 5.0},
    {"alibi": "h"},
    {"alibi": "bh"},
    {"bias": "1h1k"},
    {"bias": "bhqk", "bias_fp32": True},
    {"bias": "qk"},
    {"score_mod": "table"},
    {"score_mod": "halves"},
    {"softcap": 20.0, "alibi": "h", "bias": "b1q1", "bias_fp32": True},
)
HIDES: tuple[Choice, ...] = (
    {},
    {"mask": "bhqk"},
    {"mask": "b11k"},
    {"mask": "qk"},
    {"mask_mod": "thirds"},
    {"mask_mod": "blocks"},
    {"mask_mod": "allowed"},
    {"block_mask": "128x64 1h", "mask_mod": "thirds"},
)
SINKS: tuple[Choice, ...] = (
    {},
    {"sink": True},
    {"dropout_p": 0.2},
    {"sink": True, "dropout_p": 0.6},
)
GATE_RULES: tuple[Choice, ...] = (
    {"window": (70, -1)},
    {"causal": True, "window": (50, -1)},
    {"softcap": 5.0},
    {"alibi": "bh"},
    {"bias": "1h1k"},
    {"bias": "bhqk", "bias_fp32": True},
    {"score_mod": "table"},
    {"mask": "bhqk"},
    {"mask_mod": "thirds"},
    {"block_mask": "64x64 11", "mask_mod": "thirds"},
    {"sink": True},
    {"dropout_p": 0.3},
)


@dataclass(frozen=True)
class Case:
    """One problem for one kernel, with how its arrays lie in memory; ``group`` says what varies."""

    group: str
    kernel: str
    """A name from the ladder, or "auto"; or a kernel of the backward pass."""
    dtype: str = "float16"
    batch: int = 1
    heads: int = 2
    heads_kv: int = 2
    seqlen_q: int = 77
    seqlen_kv: int = 100
    head_dim: int = 64
    head_dim_v: int = 64
    causal: Causal = False
    gate: Gate | BackwardGate | None = None
    kind: InputKind = "normal"
    layout: Layout = "bhsd"
    view: View = "contiguous"
    repeats: int = 1
    """Launches after the first, which must give its bits."""
    seed: int = 0
    softmax_scale: float | None = None
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    alibi: Literal["", "h", "bh"] = ""
    """Axes of the slopes."""
    bias: str = ""
    """Axes of the bias, as "1h1k": letters of bhqk, or 1 where it is broadcast."""
    bias_fp32: bool = False
    """Rather than q's dtype."""
    mask: str = ""
    """Axes of the mask."""
    block_mask: str = ""
    """Sizes of a block mask's blocks, and the axes of its lists, as "64x128 1h"; a mask or a
    mask_mod has to be beside it, for its mixed blocks."""
    sink: bool = False
    dropout_p: float = 0.0
    score_mod: str = ""
    """A name in SCORE_MODS."""
    mask_mod: str = ""
    """A name in MASK_MODS."""
    lengths: tuple[tuple[int, int], ...] = ()
    """(Sq, Skv) of every sequence of a packed batch: then batch is 1, seqlen_q and seqlen_kv are
    the sums, and layout is "bshd", the first axis being dropped. See ``packed``."""
    boundaries: Literal["host", "device"] = "host"
    """Where cu_seqlens lie."""
    batch_invariant: bool = False
    only: str = ""
    """Of a backward pass: the one input whose gradient is computed; "" for all that have one."""
    deterministic: bool = True
    """Of a backward pass: other launches give the same bits."""
    dlse: bool = False
    """The log-sum-exp has a gradient, too."""
    stored: Literal["", "fp32", "added"] = ""
    """Gradients are stored in their inputs' dtypes, or in float32, or added to what is there."""

    @property
    def is_backward(self) -> bool:
        """Whether it is one of the backward pass."""
        return self.kernel in BACKWARD_KERNELS

    @property
    def wrt(self) -> tuple[str, ...]:
        """The inputs whose gradients are computed."""
        given = {"q", "k", "v", *(name for name in ("bias", "sink") if getattr(self, name))}
        given |= {"alibi_slopes"} if self.alibi else set()
        return (self.only,) if self.only else tuple(name for name in INPUTS if name in given)

    @property
    def name(self) -> str:
        """What the case is, for people, without the kernel and the dtype."""
        heads = f"H{self.heads}" + (f"/{self.heads_kv}" if self.heads_kv != self.heads else "")
        dims = f"D{self.head_dim}" + (f"/{self.head_dim_v}" if self.uneven else "")
        size = f"B{self.batch} {heads} S{self.seqlen_q}x{self.seqlen_kv} {dims}"
        if self.lengths:
            size = f"{heads} S{'+'.join(f'{m}x{n}' for m, n in self.lengths)} {dims}"
        words = [
            f"{self.group}:",
            size,
            f"{self.boundaries} boundaries" if self.lengths else "",
            {False: "", True: "causal", "top-left": "causal top-left"}[self.causal],
            f"gate {self.gate}" if self.gate else "",
            self.kind if self.kind != "normal" else "",
            self.layout if self.layout != "bhsd" and not self.lengths else "",
            self.view if self.view != "contiguous" else "",
        ]
        return " ".join(filter(None, words + self._rule_words()))

    def _rule_words(self) -> list[str]:
        given = {
            "scale": "" if self.softmax_scale is None else f"{self.softmax_scale:g}",
            "window": "" if self.window == (-1, -1) else f"{self.window[0]},{self.window[1]}",
            "softcap": f"{self.softcap:g}" if self.softcap else "",
            "alibi": self.alibi,
            "bias": self.bias and f"{self.bias}{' fp32' if self.bias_fp32 else ''}",
            "mask": self.mask,
            "blocks": self.block_mask,
            "score_mod": self.score_mod,
            "mask_mod": self.mask_mod,
            "dropout": f"{self.dropout_p:g}" if self.dropout_p else "",
        }
        words = [f"{name} {value}" for name, value in given.items() if value]
        words += ["sink"] * self.sink + ["batch-invariant"] * self.batch_invariant
        words += [f"d{self.only} alone"] * bool(self.only) + ["dlse"] * self.dlse
        words += ["sums in any order"] * (not self.deterministic)
        return [*words, {"fp32": "stored in fp32", "added": "added"}.get(self.stored, "")]

    @property
    def uneven(self) -> bool:
        """Whether v has another head dim than q and k."""
        return self.head_dim_v != self.head_dim

    @property
    def sequences(self) -> int:
        """B, or how many sequences are packed."""
        return len(self.lengths) or self.batch

    def numpy_dtype(self) -> np.dtype[np.generic]:
        """The dtype as NumPy knows it, bfloat16 by ``ml_dtypes``."""
        return np.dtype(ml_dtypes.bfloat16 if self.dtype == "bfloat16" else self.dtype)

    def problem(self) -> AttentionProblem:
        """The problem on canonical, contiguous arrays: what the oracle looks at."""
        problem = contiguous_problem(
            self.batch,
            self.heads,
            self.seqlen_q,
            self.head_dim,
            heads_kv=self.heads_kv,
            seqlen_kv=self.seqlen_kv,
            head_dim_v=self.head_dim_v,
            dtype=self.dtype,
            causal=self.causal,
            gate=None if self.is_backward else self.gate,  # type: ignore[arg-type]
        )
        scale = self.softmax_scale
        return replace(
            problem,
            softmax_scale=problem.softmax_scale if scale is None else scale,
            rules=Rules(**self._values),
        )

    def shape_of(self, name: str) -> tuple[int, int, int, int]:
        """Shape of "q", "k", "v" or "o" in the case's layout."""
        heads = self.heads if name in "qo" else self.heads_kv
        rows = self.seqlen_q if name in "qo" else self.seqlen_kv
        columns = self.head_dim if name in "qk" else self.head_dim_v
        middle = (heads, rows) if self.layout == "bhsd" else (rows, heads)
        return self.batch, *middle, columns

    def as_called(self, canonical: Array) -> Array:
        """An array (B, H, S, D) in the case's layout, or of its packed batch."""
        if self.layout == "bhsd":
            return canonical
        turned = np.ascontiguousarray(canonical.transpose(0, 2, 1, 3))
        return turned[0] if self.lengths else turned

    def rule_arrays(self) -> dict[str, Array]:
        """Arrays of the rules and of the mods, and the boundaries of packed sequences, by name."""
        rng = np.random.default_rng((self.seed, 1))
        arrays: dict[str, Array] = {}
        if self.alibi:
            shape = (self.sequences, self.heads)[-len(self.alibi) :]
            arrays["alibi_slopes"] = rng.uniform(0, 0.1, shape).astype(np.float32)
        if self.bias:
            dtype = np.float32 if self.bias_fp32 else self.numpy_dtype()
            arrays["bias"] = rng.standard_normal(self._axes(self.bias)).astype(dtype)
        if self.mask:
            arrays["mask"] = rng.random(self._axes(self.mask)) < 0.7
            if "q" in self.mask and self.seqlen_q > 1:
                arrays["mask"][..., :1, :] = False  # a query that sees nothing
        if self.block_mask:
            arrays |= self._lists(rng)
        if self.sink:
            arrays["sink"] = rng.standard_normal(self.heads).astype(np.float32)
        for mod in self.mods.values():
            arrays |= {name: _MOD_ARRAYS[name](rng) for name in mod.args}
        if self.lengths:
            bounds = np.cumsum([(0, 0), *self.lengths], axis=0, dtype=np.int32)
            arrays |= {"cu_seqlens_q": bounds[:, 0].copy(), "cu_seqlens_k": bounds[:, 1].copy()}
        return arrays

    @property
    def _values(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in NO_RULES.values}

    @property
    def mods(self) -> dict[str, Mod]:
        """What score_mod and mask_mod are, as far as there are any."""
        found = {}
        if self.score_mod:
            found["score_mod"] = SCORE_MODS[self.score_mod]
        if self.mask_mod:
            found["mask_mod"] = MASK_MODS[self.mask_mod]
        return found

    def rules(
        self,
        arrays: Mapping[str, Any],
        *,
        cuda: bool = False,
        blocks: type[BlockMask] | type[Lists] = BlockMask,
    ) -> dict[str, Any]:
        """The rules as ``attention`` takes them, but scale, causal and boundaries.

        ``arrays`` are those of ``rule_arrays``, wherever they lie; ``cuda``: mods as expressions.
        ``blocks``: what a block mask becomes.
        """
        rules = self._values | {
            rule.name: arrays[rule.name] for rule in RULES if rule.name in arrays
        }
        if self.block_mask:
            lists = {name: arrays[name] for name in LISTS}
            seqlens = self.seqlen_q, self.seqlen_kv
            rules["block_mask"] = blocks(arrays=lists, seqlens=seqlens, block=self._block)
        if self.dropout_p:
            rules["rng"] = (self.seed, 2**40)
        rules |= {name: mod.cuda if cuda else mod.python for name, mod in self.mods.items()}
        names = [name for mod in self.mods.values() for name in mod.args]
        return rules | ({"mod_args": {name: arrays[name] for name in names}} if names else {})

    def arguments(self, arrays: Mapping[str, Any], *, cuda: bool) -> dict[str, Any]:
        """Every argument of ``attention`` but q, k, v, out, return_lse and kernel."""
        boundaries = ("cu_seqlens_q", "cu_seqlens_k") if self.lengths else ()
        return {
            "layout": self.layout,
            "softmax_scale": self.softmax_scale,
            "causal": self.causal,
            "gate": self.gate,
            "batch_invariant": self.batch_invariant,
            **self.rules(arrays, cuda=cuda),
            **{name: arrays[name] for name in boundaries},
        }

    @property
    def _block(self) -> tuple[int, int]:
        queries, keys = self.block_mask.split()[0].split("x")
        return int(queries), int(keys)

    def _lists(self, rng: np.random.Generator) -> dict[str, Array]:
        """Of blocks that are empty, mixed or full, a third of each; the first row has none.

        Every other full block is in the list of mixed ones, too.
        """
        rows, keys = map(blocks_of, (self.seqlen_q, self.seqlen_kv), self._block)
        states = rng.choice(3, (*self._axes(self.block_mask.split()[1]), rows, keys))
        states[..., :1, :] *= rows == 1
        full = states == FULL
        mixed = (states == MIXED) | (full & (np.arange(keys) % 2 == 0))
        lists = (packed_lists(listed, np) for listed in (mixed, full))
        return dict(zip(LISTS, (x for pair in lists for x in pair), strict=True))

    def _axes(self, axes: str) -> tuple[int, ...]:
        sizes = {
            "b": self.batch,
            "h": self.heads,
            "q": self.seqlen_q,
            "k": self.seqlen_kv,
            "1": 1,
        }
        return tuple(sizes[axis] for axis in axes)


def packed(case: Case, lengths: tuple[tuple[int, int], ...]) -> Case:
    """The case with a packed batch of sequences of these (Sq, Skv)."""
    seqlen_q, seqlen_kv = (sum(n[side] for n in lengths) for side in (0, 1))
    return replace(
        case, batch=1, seqlen_q=seqlen_q, seqlen_kv=seqlen_kv, lengths=lengths, layout="bshd"
    )
