"""Whether gradients are right: the rule of acceptance, for each by itself.

NaN and infinity stand where they should. Elsewhere the largest error is at most twice that of
``reference_gradients.naive``, or an epsilon of the largest value; for float32, whose tensor cores
truncate, four times, or 3 x 2^-22. Beside that it may be ``reference_gradients.roundings``: where
terms cancel, as for a query with one key, what is left is float32's rounding, and luck. So it is
with the largest error of a few numbers, so the naive pass is made several times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from flashcore_cupy.check.verify import with_limit
from flashcore_cupy.cpu import reference, reference_gradients
from flashcore_cupy.cpu.reference import Comparison
from flashcore_cupy.problem.attention_problem import EPSILON
from flashcore_cupy.problem.blocks import Array
from flashcore_cupy.problem.gradients import Gradients, by_result

# The naive pass is made as often as gives so many numbers of each gradient; of 16 bits so often at
# least, as a few outliers may decide; no more than so often, nor for more scores than so many.
_NUMBERS, _FEWEST_DRAWS, _DRAWS, _SCORES = 512, 4, 8, 2**24


@dataclass(frozen=True)
class ExpectedGradient:
    """One gradient in the caller's layout, and what it is held to."""

    dtype: str
    """Of q."""
    values: Array
    """float64."""
    naive: tuple[Array, ...]
    roundings: Array

    def judge(self, got: Array) -> Comparison:
        """Judge a result, a NumPy array of this shape in any float dtype."""
        with np.errstate(all="ignore"):
            rounded = self.values.astype(got.dtype).astype(np.float64)
            naive = [x.astype(got.dtype).astype(np.float64) for x in self.naive]
            # What no number of that dtype is near becomes infinity.
            values = np.where(np.isfinite(rounded), self.values, rounded)
            naive_error = max(_largest(x - values) for x in naive)
        is_full = self.dtype == "float32"
        factor, epsilon = (4.0, 3 * 2.0**-22) if is_full else (2.0, EPSILON[self.dtype])
        allowed = max(factor * naive_error, epsilon * _largest(values)) + _largest(self.roundings)
        return with_limit(reference.compare(got, values, naive[0]), allowed)


@dataclass(frozen=True)
class ExpectedGradients:
    """What ``attention_backward`` should give, by the names of ``Gradients``."""

    each: Mapping[str, ExpectedGradient]

    def judge(self, got: Gradients) -> dict[str, Comparison]:
        """Judge all that were asked for, NumPy arrays."""
        found = by_result(got)
        return {name: one.judge(found[name]) for name, one in self.each.items()}

    def faults(self, got: Gradients) -> str:
        """Say what is wrong; empty if nothing is."""
        judged = self.judge(got)
        return "; ".join(f"{n}: {found.reason}" for n, found in judged.items() if found.reason)


def expect(
    do: Array,
    q: Array,
    k: Array,
    v: Array,
    *,
    dlse: Array | None = None,
    wrt: Iterable[str] = ("q", "k", "v"),
    layout: str = "bhsd",
    cu_seqlens_q: Array | None = None,
    cu_seqlens_k: Array | None = None,
    **rules: Any,
) -> ExpectedGradients:
    """What ``attention_backward`` gives on NumPy arrays, from its arguments of these names.

    Rules' arrays are NumPy arrays, and mods callables. The forward pass is done again, in each of
    the precisions.
    """
    operands = (do, q, k, v)

    def by(function: Callable[..., dict[str, Array]]) -> dict[str, Array]:
        given: dict[str, Any] = {"dlse": dlse, "wrt": tuple(wrt), **rules}
        if cu_seqlens_q is not None and cu_seqlens_k is not None:
            boundaries = np.asarray(cu_seqlens_q), np.asarray(cu_seqlens_k)
            return reference_gradients.of_packed(function, *operands, *boundaries, **given)
        found = function(*(_turned(x, layout) for x in operands), **given)
        return {n: _turned(x, layout) if n in ("q", "k", "v") else x for n, x in found.items()}

    values, roundings = by(reference_gradients.oracle), by(reference_gradients.roundings)
    fewest = min(x.size for x in values.values())
    rows, keys = (x.size // x.shape[-1] for x in (q, k))
    least = _FEWEST_DRAWS if q.dtype.itemsize == 2 else 1
    asked = max(least, min(_DRAWS, _NUMBERS // max(1, fewest)))
    draws = max(1, min(asked, _SCORES // max(1, rows * keys)))
    naive = [by(partial(reference_gradients.naive, grid=1 + n / _DRAWS)) for n in range(draws)]
    one = partial(ExpectedGradient, q.dtype.name)
    return ExpectedGradients(
        {
            f"d{name}": one(x, tuple(drawn[name] for drawn in naive), roundings[name])
            for name, x in values.items()
        }
    )


def _turned(x: Array, layout: str) -> Array:
    return x if layout == "bhsd" else x.transpose(0, 2, 1, 3)


def _largest(x: Array) -> float:
    return float(np.abs(x[np.isfinite(x)]).max(initial=0.0))
