"""Which arrays the unit that copies boxes of an array (TMA) can address."""

from __future__ import annotations

from flashcore_cupy.problem.attention_problem import ITEMSIZE, AttentionProblem, Operand
from flashcore_cupy.select.tile_checks import TMA_ALIGN

_MAX_STRIDE = 2**40


def check_layout(problem: AttentionProblem) -> None:
    """Raise ``ValueError`` if TMA cannot address q, k or v; it names which."""
    operands = (problem.q, problem.k, problem.v)
    unfit = [op.name for op in operands if not is_addressable(op, problem.dtype)]
    if unfit:
        raise ValueError(
            f"loads by TMA: needs rows that start and end on multiples of {TMA_ALIGN} bytes, and "
            f"positive strides, unlike those of {', '.join(unfit)}"
        )


def is_addressable(operand: Operand, dtype: str) -> bool:
    """Whether a map can describe an array of q, k, v or o."""
    if 0 in operand.shape:
        return True
    size = ITEMSIZE[dtype]
    used = [step * size for n, step in zip(operand.shape, operand.strides, strict=False) if n > 1]
    return operand.align_bytes % TMA_ALIGN == 0 and all(0 < step < _MAX_STRIDE for step in used)
