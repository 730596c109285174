"""Dropout, the rule for what the softmax gives; ``philox`` says which probabilities it takes."""

from __future__ import annotations

from typing import Any, ClassVar

from flashcore_cupy.problem.blocks import ScoreShape
from flashcore_cupy.problem.philox import UNIT
from flashcore_cupy.problem.rule import Rule
from flashcore_cupy.problem.values import check_number, shown


class DropoutP(Rule):
    """Zeros among the probabilities; Srivastava et al. 2014."""

    name, default, takes = "dropout_p", 0.0, "value"
    acts_on = "probabilities"
    codes: ClassVar = {"dropout": 8192}
    numbers = ("dropout_p", "keep_scale")

    def describe(self, value: Any, scores: ScoreShape, dtype: str) -> float:
        """Return it rounded to a multiple of 2^-16."""
        return rounded_dropout(value)

    def differs_by_head(self, described: Any) -> bool:
        """Each head has a draw of its own."""
        return True

    def params(self, described: Any) -> dict[str, Any]:
        """Return it, and what makes up for it."""
        return {"dropout_p": described, "keep_scale": 1 / (1 - described)}


def rounded_dropout(p: object) -> float:
    """Check a ``dropout_p``; return it rounded to a multiple of 2^-16, below 1."""
    number = check_number("dropout_p", p, "0 for none")
    if not 0 <= number < 1:  # so written that NaN fails
        raise ValueError(f"dropout_p: got {shown(p)}; use a number from 0 up to, but not, 1")
    return min(round(float(number) * UNIT), UNIT - 1) / UNIT
