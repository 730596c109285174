"""How a case of the backward pass runs: as in `matrix`, with more arrays.

The output and the log-sum-exp that it is given are NumPy's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from flashcore_cupy.attention import attention
from flashcore_cupy.backward import plan_backward
from flashcore_cupy.check import verify_backward, verify_gradients
from flashcore_cupy.check.inputs import output_gradient
from flashcore_cupy.check.selftest.arrays import Embedded, Placed, Setup, embed, set_up
from flashcore_cupy.check.selftest.case import Case
from flashcore_cupy.check.selftest.outcome import CaseResult, Emulated
from flashcore_cupy.check.verify import on_host
from flashcore_cupy.check.verify_backward import GradientsCheck
from flashcore_cupy.cpu.emulator.backward import EmulatedBackward, emulated_backward
from flashcore_cupy.cpu.emulator.run import Schedule
from flashcore_cupy.problem.blocks import Array
from flashcore_cupy.problem.gradients import BackwardRequest
from flashcore_cupy.select.backward import select_backward
from flashcore_cupy.select.backward_plan import BackwardPlan
from flashcore_cupy.select.config import KernelConfig


@dataclass(frozen=True)
class GradientSetup:
    """A case's arrays, as they will lie on the GPU, and what they hold."""

    forward: Setup
    """q, k, v and the rules' arrays."""
    host: dict[str, Array]
    """do, q, k, v, o, lse and dlse as a caller has them, contiguous."""
    beside: dict[str, Embedded]
    """All of these but q, k and v."""
    results: dict[str, Embedded]
    """The gradients: NaN, or what they are added to."""


def lay_out(case: Case, *, empty: bool = False) -> GradientSetup:
    """Draw a case's arrays and lay them out; ``empty``: o and lse hold anything."""
    forward = set_up(case)
    host = {n: case.as_called(x) for n, x in zip("qkv", forward.host, strict=True)}
    host["do"] = case.as_called(output_gradient(case.problem(), case.seed))
    if empty:
        heads = (case.heads, case.seqlen_q)
        host["o"] = host["do"]
        host["lse"] = np.zeros(heads if case.lengths else (case.batch, *heads), np.float32)
    else:
        rules = _rules(case)
        host["o"], host["lse"] = attention(*(host[n] for n in "qkv"), return_lse=True, **rules)
    if case.dlse:
        rng = np.random.default_rng((case.seed, 3))
        host["dlse"] = rng.standard_normal(host["lse"].shape, np.float32)
    views = {"do": case.view, "o": case.view}
    beside = {
        name: _embedded(x, views.get(name, "contiguous"), x)
        for name, x in host.items()
        if name not in ("q", "k", "v")
    }
    return GradientSetup(forward, host, beside, {} if case.gate else _results(case, host))


def _results(case: Case, host: Mapping[str, Array]) -> dict[str, Embedded]:
    view = "contiguous" if case.view == "transposed" else case.view
    rng = np.random.default_rng((case.seed, 4))
    inputs, found = {**host, **case.rule_arrays()}, {}
    for name in case.wrt:
        like = inputs[name].astype(np.float32) if case.stored else inputs[name]
        before = rng.standard_normal(like.shape, np.float32) if case.stored == "added" else None
        found[f"d{name}"] = _embedded(like, view if name in "qkv" else "contiguous", before)
    return found


def _embedded(like: Array, view: str, content: Array | None) -> Embedded:
    """An array of this shape and dtype among NaN; it has four axes, the first ones of length 1."""
    four = (1,) * (4 - like.ndim) + like.shape
    content = None if content is None else content.reshape(four)
    return embed(four, like.dtype, view, like=content)


def _own_axes(view: Any, like: Array) -> Any:
    return view[(0,) * (4 - like.ndim)]


def _rules(case: Case) -> dict[str, Any]:
    """The arguments of ``attention`` for NumPy, without a gate."""
    return case.arguments(case.rule_arrays(), cuda=False) | {"gate": None}


@dataclass(frozen=True)
class PlacedGradients:
    """A case's arrays where it runs, the gradients among them."""

    arguments: dict[str, Any]
    """Of ``attention_backward``."""
    results: dict[str, Any]
    buffers: dict[str, Any]
    """Of the results, with what lies around them."""

    @classmethod
    def of(cls, case: Case, setup: GradientSetup, *, on_gpu: bool) -> PlacedGradients:
        """Lay out on the GPU, or as NumPy arrays that share the setup's buffers."""
        forward = Placed.of(case, setup.forward, on_gpu=on_gpu, in_kernel=True)
        arguments = dict(zip("qkv", forward.inputs, strict=True))
        shaped = setup.host | {f"d{n}": x for n, x in (setup.host | case.rule_arrays()).items()}
        buffers, views = {}, {}
        for name, embedded in (setup.beside | setup.results).items():
            buffer, view = embedded.on_gpu() if on_gpu else (embedded.buffer, embedded.on_host())
            buffers[name], views[name] = buffer, _own_axes(view, shaped[name])
        arguments |= {name: views[name] for name in setup.beside}
        results = {name: views[name] for name in setup.results}
        chosen = {"kernel": case.kernel, "wrt": case.wrt, "deterministic": case.deterministic}
        chosen["accumulate"] = case.stored == "added"
        chosen |= {"out": results} if results else {}
        own = {name: buffers[name] for name in results}
        return cls(arguments | chosen | forward.arguments, results, own)

    def faults(self, setup: GradientSetup) -> list[str]:
        """What was written beside the results."""
        return [
            f"wrote beside {name}"
            for name, buffer in self.buffers.items()
            if not setup.results[name].surroundings_are_nan(on_host(buffer))
        ]


def configs_of(case: Case, arch: str) -> tuple[KernelConfig, ...]:
    """What a case compiles; ``ValueError`` if the kernel refuses it on this target."""
    arguments = PlacedGradients.of(case, lay_out(case, empty=True), on_gpu=False).arguments
    names = ("do", "q", "k", "v", "o", "lse")
    operands = {name: arguments.pop(name) for name in names}
    operands["dlse"] = arguments.pop("dlse", None)
    request = BackwardRequest.taken(arguments)
    call = request.call(operands, request.out, on_gpu=False, empty=np.empty)
    return select_backward(call.problem, arch, kernel=case.kernel).configs


def run_case(case: Case, emulated: Emulated | None = None) -> CaseResult:
    """Run one case on the current GPU, or emulated; raises what kernels that fail raise."""
    setup = lay_out(case)
    untouched = {name: x.buffer.copy() for name, x in setup.results.items()}
    placed = PlacedGradients.of(case, setup, on_gpu=emulated is None)
    bound = _bound(placed.arguments, emulated)
    first, faults = _outputs(bound, case, emulated), []
    for n in range(case.repeats if emulated is None else 1):
        for name, buffer in placed.buffers.items():
            _refill(buffer, untouched[name])
        again = _outputs(bound, case, emulated, n + 1)
        same = all(x.tobytes() == again[name].tobytes() for name, x in first.items())
        if case.deterministic and not same:
            faults.append("another launch gave other bits")
            break
    faults += placed.faults(setup)
    if case.stored == "added":
        placed_at = setup.results
        first = {n: x - _before(placed_at[n], untouched[n], x) for n, x in first.items()}
    return judge(case, setup, first, faults)


def _refill(buffer: Any, content: Array) -> None:
    if isinstance(buffer, np.ndarray):
        buffer[...] = content
    else:
        buffer.set(content)


def _before(embedded: Embedded, buffer: Array, like: Array) -> Array:
    """What a result held before the first launch."""
    kept = Embedded(buffer, embedded.offset, embedded.shape, embedded.strides)
    found: Array = _own_axes(kept.on_host(), like)
    return found


def _bound(arguments: Mapping[str, Any], emulated: Emulated | None) -> BackwardPlan:
    if emulated is None:
        return plan_backward(**arguments)
    return bind_emulated(arguments, emulated.arch)


def bind_emulated(arguments: Mapping[str, Any], arch: str) -> EmulatedBackward:
    """Bind arguments of ``attention_backward``, NumPy arrays, to emulated kernels."""
    names = ("do", "q", "k", "v", "o", "lse", "dlse")
    operands = {name: arguments[name] for name in names if name in arguments}
    rest = {name: x for name, x in arguments.items() if name not in operands}
    return emulated_backward(operands, arch, **rest)


def _outputs(
    bound: BackwardPlan, case: Case, emulated: Emulated | None, launches: int = 0
) -> dict[str, Array]:
    """Launch; return what was written."""
    if isinstance(bound, EmulatedBackward) and emulated is not None:
        schedule = Schedule.seeded(emulated.seed + launches)
        bound.launch(schedule, checking=emulated.checking)
    else:
        bound.launch()
    return written(bound, case)


def written(bound: BackwardPlan, case: Case) -> dict[str, Array]:
    """Copy the gradients, or the gate's array, to the host."""
    if case.gate is not None:
        return {case.gate: on_host(bound.gate_output())}
    results = bound.gradients._asdict().items()
    return {name: on_host(x) for name, x in results if x is not None}


def judge(
    case: Case, setup: GradientSetup, got: Mapping[str, Array], faults: list[str]
) -> CaseResult:
    """Compare what was launched with what the oracle says about the case's inputs."""
    rules = _rules(case)
    for name in ("gate", "batch_invariant"):
        del rules[name]
    host = setup.host
    if case.gate is not None:
        layout = rules.pop("layout")
        axes = (0, 1, 2, 3) if layout == "bhsd" else (0, 2, 1, 3)
        turned = {n: x.transpose(axes) if x.ndim == 4 else x for n, x in host.items()}
        stage = got[case.gate]
        check = verify_backward.check_stage(case.problem(), case.gate, turned, stage, rules)
    else:
        do, q, k, v = (host[name] for name in ("do", "q", "k", "v"))
        expected = verify_gradients.expect(
            do, q, k, v, dlse=host.get("dlse"), wrt=case.wrt, **rules
        )
        check = GradientsCheck({n: x.judge(got[n]) for n, x in expected.each.items()}, 1, 1)
    reason = "; ".join(filter(None, (check.reason, *faults)))
    worst = check.comparison
    return CaseResult(case, not reason, worst.max_error, worst.allowed_error, reason)
