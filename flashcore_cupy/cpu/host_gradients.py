"""Gradients on NumPy arrays: a described call, for the tiled path or an emulated kernel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from flashcore_cupy.cpu import gates
from flashcore_cupy.cpu.host import rules_of
from flashcore_cupy.cpu.tiled_gradients import tiled_gradients
from flashcore_cupy.cuda.targets import target_without_gpu
from flashcore_cupy.problem.blocks import Array
from flashcore_cupy.problem.gradients import BackwardCall
from flashcore_cupy.select.backward import select_backward

if TYPE_CHECKING:
    from flashcore_cupy.cpu.emulator.backward import EmulatedBackward

_INPUTS = ("do", "q", "k", "v", "o", "lse", "dlse")
_OF_KEYS = ("k", "v", "dk", "dv")
_PER_ROW = ("lse", "dlse")


def differentiate(call: BackwardCall) -> Array | None:
    """Write the results of a call; return what its gate asks for.

    A kernel by name is emulated; by default NumPy does it.
    """
    gate = call.problem.gate
    if call.forward.kernel != "auto":
        plan = bind(call)
        plan.launch()
        return None if gate is None else plan.gate_output()
    if gate is not None:
        arrays = {name: call.arrays[name] for name in _INPUTS if name in call.arrays}
        return gates.gradients(gate, _batch(call, arrays), _rules(call))
    with np.errstate(all="ignore"):  # NaN, infinity and underflow are data here, as on a GPU
        _by_numpy(call)
    return None


def bind(call: BackwardCall) -> EmulatedBackward:
    """Bind a call that names a kernel."""
    from flashcore_cupy.cpu.emulator import backward  # late: it is slow to import

    return backward.bind(call, target_without_gpu())


def explain(call: BackwardCall) -> str:
    """Tell what a call does."""
    forward = call.forward
    if forward.kernel == "auto":
        return "NumPy arrays: tiled gradients on the CPU, fp32 accumulation"
    arch = target_without_gpu()
    selection = select_backward(call.problem, arch, kernel=forward.kernel, overrides=forward.config)
    copied = [f"copied {name}: {why}" for name, why in call.copied.items()]
    return "\n".join([*selection.explained(arch), "NumPy arrays: emulated on the CPU", *copied])


def _rules(call: BackwardCall) -> dict[str, Any]:
    return rules_of(call.forward) | {"score_mod_grad": call.score_mod_grad}


def _by_numpy(call: BackwardCall) -> None:
    problem, arrays, rules = call.problem, call.arrays, _rules(call)
    whole = {name: arrays[name] for name in _INPUTS if name in arrays}
    whole |= {r.name: arrays[r.name] for r in problem.results if r.operand is not None}
    others = [result for result in problem.results if result.operand is None]
    sums = {r.of: np.zeros(arrays[r.name].shape, np.float32) for r in others}
    parts = _sequences(call, whole) if problem.attention.packed else [_batch(call, whole)]
    for number, views in enumerate(parts):
        into = {name[1:]: views.pop(name) for name in ("dq", "dk", "dv") if name in views}
        if problem.attention.packed:
            rules["sequence"] = number
        tiled_gradients(**views, into=into | sums, accumulate=problem.accumulate, **rules)
    for result in others:
        target = arrays[result.name]
        target[...] = target + sums[result.of] if problem.accumulate else sums[result.of]


def _batch(call: BackwardCall, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """(B, H, S, D) views."""
    if call.problem.attention.layout == "bhsd":
        return dict(arrays)
    return {n: x if n in _PER_ROW else x.transpose(0, 2, 1, 3) for n, x in arrays.items()}


def _sequences(call: BackwardCall, arrays: Mapping[str, Array]) -> Iterator[dict[str, Array]]:
    """Each sequence of a packed batch, as (1, H, S, D) views."""
    boundaries = (call.arrays[name].tolist() for name in ("cu_seqlens_q", "cu_seqlens_k"))
    for rows, keys in zip(*(pairwise(x) for x in boundaries), strict=True):
        yield {
            name: x[None, :, slice(*rows)]
            if name in _PER_ROW
            else x[slice(*(keys if name in _OF_KEYS else rows))].swapaxes(0, 1)[None]
            for name, x in arrays.items()
        }
