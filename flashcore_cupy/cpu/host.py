"""Attention on NumPy arrays: a described call, for the tiled attention or an emulated kernel."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from flashcore_cupy.cpu import gates, tiled_attention
from flashcore_cupy.cuda.targets import target_without_gpu
from flashcore_cupy.problem.array_spec import usable
from flashcore_cupy.problem.attention_problem import check_choice
from flashcore_cupy.problem.request import Call, Request
from flashcore_cupy.problem.rules import RULES, hiding
from flashcore_cupy.select.registry import KERNELS
from flashcore_cupy.select.selector import select

if TYPE_CHECKING:
    from flashcore_cupy.cpu.emulator.plan import EmulatedPlan


def attend(call: Call) -> tuple[Any, Any]:
    """Return the output, or what the gate asks for, and the log-sum-exp; None with such a gate.

    A kernel by name is emulated; by default NumPy does it.
    """
    if call.kernel != "auto":
        return _emulated(call)
    with np.errstate(all="ignore"):  # NaN, infinity and underflow are data here, as on a GPU
        return _attend(call)


def _attend(call: Call) -> tuple[Any, Any]:
    problem, rules = call.problem, rules_of(call)
    q, k, v = (usable(call.arrays[name], np) for name in "qkv")
    out = call.arrays.get("out")
    if out is None:
        out = np.empty(problem.output_shape, q.dtype)
    if problem.packed:
        return _packed(call, rules, q, k, v, out)
    views = [x if problem.layout == "bhsd" else x.transpose(0, 2, 1, 3) for x in (q, k, v, out)]
    if problem.gate == "qk":
        return gates.scores(views[0], views[1], views[2], rules), None
    if problem.gate == "softmax":
        return gates.probabilities(views[0], views[1], views[2], rules), None
    if problem.gate == "pv":  # all scores 0, whatever q and k hold and the rules make of them
        views[0], views[1] = np.zeros_like(views[0]), np.zeros_like(views[1])
        rules = hiding(rules)
    _, lse = tiled_attention.tiled(*views[:3], **rules, out=views[3])
    return out, lse


def _emulated(call: Call) -> tuple[Any, Any]:
    plan = bind(call)
    plan.launch()
    if call.problem.gate in ("qk", "softmax"):
        return plan.gate_output(), None
    return plan.arrays["o"], plan.arrays["lse"]


def bind(call: Call, *, want_lse: bool = True) -> EmulatedPlan:
    """Bind a call that names a kernel."""
    from flashcore_cupy.cpu.emulator import plan  # late: it is slow to import

    return plan.bind(call, target_without_gpu(), want_lse=want_lse)


def explain(call: Call) -> str:
    """Tell what a call does."""
    if call.kernel == "auto":
        return "NumPy arrays: tiled online-softmax attention on the CPU, fp32 accumulation"
    arch = target_without_gpu()
    selection = select(call.problem, arch, kernel=call.kernel, overrides=call.config)
    copied = [f"copied {name}: {why}" for name, why in call.copied.items()]
    return "\n".join([*selection.explained(arch), "NumPy arrays: emulated on the CPU", *copied])


def _packed(call: Call, rules: dict[str, Any], q: Any, k: Any, v: Any, out: Any) -> tuple[Any, Any]:
    lse = np.empty(call.problem.lse_shape, np.float32)
    boundaries = (call.arrays[name] for name in ("cu_seqlens_q", "cu_seqlens_k"))
    for n, (*one, rows) in enumerate(tiled_attention.sequences(q, k, v, *boundaries)):
        target = out[rows].swapaxes(0, 1)[None]
        _, found = tiled_attention.tiled(*one, **rules, sequence=n, out=target)
        lse[:, rows] = found[0]
    return out, lse


def rules_of(call: Call) -> dict[str, Any]:
    """Every rule of the call, with its data."""
    problem = call.problem
    arrays = {rule.name: call.arrays[rule.name] for rule in RULES if rule.name in call.arrays}
    found: dict[str, Any] = {"softmax_scale": problem.softmax_scale, "causal": problem.causal}
    found["rng"], found["block_mask"] = call.arrays.get("rng", call.rng), call.lists
    return {**found, **problem.rules.values, **arrays, **call.formulas, "mod_args": call.mod_args}


def check_request(request: Request, stream: Any, kernels: Iterable[str] = KERNELS) -> None:
    """Raise ``ValueError`` for what means nothing on the host, but for these ``kernels``."""
    check_choice("kernel", request.kernel, ("auto", *kernels))
    if stream is not None:
        raise ValueError("stream: is of a GPU, but q, k, v are NumPy arrays; leave it out")
    if request.config is not None and request.kernel == "auto":
        raise ValueError(
            "config: changes a kernel's tile, but NumPy arrays are for NumPy where no kernel is "
            "named; name one to have it emulated, as kernel='mma_sm80', or leave config out"
        )
