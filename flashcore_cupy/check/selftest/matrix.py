"""The correctness matrix on this machine's GPU, or emulated: `cases` has what is tried, this how.

Every case puts its inputs into larger buffers full of NaN, starts its outputs as NaN, launches
twice, and wants the same bits, an untouched surrounding, and the result that `verify` expects.
`gradients` does so for cases of the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from flashcore_cupy.attention import plan
from flashcore_cupy.check import verify
from flashcore_cupy.check.machine import machine
from flashcore_cupy.check.selftest import gradients
from flashcore_cupy.check.selftest.arrays import Placed, Setup, described, set_up
from flashcore_cupy.check.selftest.backward_cases import backward_cases
from flashcore_cupy.check.selftest.cases import Case, cases
from flashcore_cupy.check.selftest.outcome import CaseResult, Emulated, failures
from flashcore_cupy.cpu.emulator.build import Source, build_libraries
from flashcore_cupy.cpu.emulator.plan import EmulatedPlan, emulated_plan
from flashcore_cupy.cpu.emulator.run import Schedule, stop_all
from flashcore_cupy.cuda.targets import target_without_gpu
from flashcore_cupy.jit import compiler
from flashcore_cupy.launch import builds
from flashcore_cupy.problem.blocks import Array
from flashcore_cupy.select import selector
from flashcore_cupy.select.config import KernelConfig
from flashcore_cupy.select.plan import Plan

__all__ = ["Case", "CaseResult", "Emulated", "cases", "every_case", "run_all", "run_case"]

_THREADS = 8
_QUICK = 7  # no multiple of the 2 and 3 by which choices rotate


def case_config(case: Case, arch: str) -> tuple[KernelConfig, ...]:
    """What a case compiles; ``ValueError`` if the kernel refuses it on this target."""
    if case.is_backward:
        return gradients.configs_of(case, arch)
    selection = selector.select(described(case), arch, kernel=case.kernel)
    return selection.configs


def run_case(case: Case, emulated: Emulated | None = None) -> CaseResult:
    """Run one case on the current GPU, or emulated.

    A kernel that fails gives a result that is not ok.
    """
    try:
        if case.is_backward:
            return gradients.run_case(case, emulated)
        setup = set_up(case)
        launched = _launch(case, setup, emulated)
    except failures(emulated) as error:
        return CaseResult(case, False, None, None, str(error).splitlines()[0])
    return judge(case, setup.host, launched)


def every_case() -> list[Case]:
    """Those of both passes."""
    return [*cases(), *backward_cases()]


@dataclass(frozen=True)
class Launched:
    """What a case's launches left, on the host, canonical (B, H, S, ...)."""

    got: Array
    lse: Array | None
    quantized: dict[str, verify.Quantized] | None
    tile: int
    faults: tuple[str, ...] = ()


def _launch(case: Case, setup: Setup, emulated: Emulated | None) -> Launched:
    placed = Placed.of(case, setup, on_gpu=emulated is None, in_kernel=True)
    untouched = setup.out.buffer.copy()
    bound = _bound(case, placed.inputs, placed.arguments, emulated, out=placed.out)
    if case.gate is None:
        bound.arrays["lse"].fill(np.nan)
    faults: list[str] = []
    first = _outputs(bound, case, emulated)
    for n in range(case.repeats if emulated is None else 1):
        placed.refill_out(untouched)
        again = _outputs(bound, case, emulated, n + 1)
        if any(x.tobytes() != y.tobytes() for x, y in zip(first, again, strict=True)):
            faults.append("another launch gave other bits")
            break
    if not setup.out.surroundings_are_nan(verify.on_host(placed.out_buffer)):
        faults.append("wrote beside the output")
    if case.group == "invariant":
        faults += _alone_faults(case, placed, first, emulated)
    return Launched(
        got=first[0],
        lse=first[1] if len(first) > 1 else None,
        quantized=verify.read_quantized(bound) if bound.selection.kernel.quantizes else None,
        tile=bound.selection.config.tile.block_m,
        faults=tuple(faults),
    )


def _bound(
    case: Case,
    operands: Sequence[Any],
    arguments: Mapping[str, Any],
    emulated: Emulated | None,
    out: Any = None,
) -> Plan:
    q, k, v = operands
    wanted = {"kernel": case.kernel, "return_lse": case.gate is None, "out": out, **arguments}
    if emulated is None:
        return plan(q, k, v, **wanted)
    return emulated_plan(q, k, v, emulated.arch, **wanted)


def _outputs(bound: Plan, case: Case, emulated: Emulated | None, launches: int = 0) -> list[Array]:
    """Launch; copy the output or the gate's array, and the log-sum-exp, to the host, canonical."""
    if isinstance(bound, EmulatedPlan) and emulated is not None:
        schedule = Schedule.seeded(emulated.seed + launches)
        bound.launch(schedule, checking=emulated.checking)
    else:
        bound.launch()
    if case.gate in ("qk", "softmax"):
        return [verify.on_host(bound.gate_output())]
    written = (verify.on_host(bound.arrays[n]) for n in ("o", "lse") if n in bound.arrays)
    return canonical(case, *written)


def canonical(case: Case, o: Array, *lse: Array) -> list[Array]:
    """Output and log-sum-exp of ``attention`` as (1 or B, H, S, Dv) and (1 or B, H, S)."""
    if case.lengths:
        o, lse = o[None], tuple(x[None] for x in lse)
    return [o if case.layout == "bhsd" else o.transpose(0, 2, 1, 3), *lse]


def _alone_faults(
    case: Case, placed: Placed, whole: list[Array], emulated: Emulated | None
) -> Iterator[str]:
    """Sequences whose bits are others when they are all of the batch; for cases without rules."""
    arguments = {n: x for n, x in placed.arguments.items() if not n.startswith("cu_seqlens")}
    starts = np.cumsum([(0, 0), *case.lengths], axis=0)
    for n in range(case.sequences):
        if case.lengths:
            rows, keys = (slice(*starts[n : n + 2, side]) for side in (0, 1))
            own = [x[s][None] for x, s in zip(placed.inputs, (rows, keys, keys), strict=True)]
            expected = whole[0][:, :, rows]
        else:
            own = [x[n : n + 1] for x in placed.inputs]
            expected = whole[0][n : n + 1]
        bound = _bound(case, own, arguments, emulated)
        o = _outputs(bound, replace(case, lengths=()), emulated)[0]
        if o.tobytes() != expected.tobytes():
            yield f"sequence {n} alone gives other bits"


def judge(case: Case, host: tuple[Array, Array, Array], launched: Launched) -> CaseResult:
    """Compare what was launched with what the oracle says about the case's inputs."""
    problem, faults = case.problem(), list(launched.faults)
    arrays = case.rule_arrays()
    rules = case.rules(arrays)
    if case.lengths:
        boundaries = [arrays[name] for name in ("cu_seqlens_q", "cu_seqlens_k")]
        expectation = verify.expect_packed(problem, host, boundaries, rules)
    elif launched.quantized is not None:
        expectation, wrong = verify.expect_quantized(
            problem, *host, launched.quantized, tile=launched.tile
        )
        faults += wrong
    else:
        expectation = verify.expect(problem, *host, tile=launched.tile, rules=rules)
    check = expectation.judge(launched.got, launched.lse)
    reason = "; ".join(filter(None, (check.reason, *faults)))
    result = check.comparison
    return CaseResult(case, not reason, result.max_error, result.allowed_error, reason)


def run_all(
    *,
    quick: bool = False,
    on_start: Callable[[int, str], None] | None = None,
    on_step: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Compile everything in parallel, run every case (``quick``: a part), and report.

    Without a GPU kernels are emulated; ``RuntimeError`` without a C++ compiler. ``on_start(steps,
    words)`` announces a phase, ``on_step(words)`` each of its steps. Returns a mapping with
    kernels_digest, gpu, driver, nvrtc, cupy, date, passed, failed, emulated, rows.
    """
    announce = on_start or (lambda steps, words: None)
    step = on_step or (lambda words: None)
    on_gpu = compiler.no_gpu_reason() is None
    arch = compiler.device_arch() if on_gpu else target_without_gpu()
    emulated = None if on_gpu else Emulated(arch)
    chosen = runnable(every_case(), arch)
    chosen = chosen[::_QUICK] if quick else chosen
    wanted = list(dict.fromkeys(c for case in chosen for c in case_config(case, arch)))
    announce(len(wanted), "compiling")
    if on_gpu:
        pairs = [(config, arch) for config in wanted]
        builds.build_each(pairs, lambda done: step(builds.what(done)))
    else:
        build_libraries([Source.of(config, arch) for config in wanted], step)
    announce(len(chosen), "checking")

    results = []
    with ThreadPoolExecutor(_THREADS) as pool:  # most of the time is the oracle's
        try:
            for result in pool.map(lambda case: run_case(case, emulated), chosen):
                results.append(result)
                step(result.case.kernel)
        except BaseException:
            stop_all()  # the pool waits for its threads
            raise
    return report(results, arch, emulated=not on_gpu)


def runnable(every: Sequence[Case], arch: str) -> list[Case]:
    """The cases whose kernel takes them on this target."""
    taken = []
    for case in every:
        try:
            case_config(case, arch)
        except ValueError:
            continue
        taken.append(case)
    return taken


def report(results: Sequence[CaseResult], arch: str, *, emulated: bool = False) -> dict[str, Any]:
    """Join results with where they come from; the JSON of `selftest`."""
    passed = sum(result.ok for result in results)
    return {
        **machine(arch).to_json(),
        "passed": passed,
        "failed": len(results) - passed,
        "emulated": emulated,
        "rows": [result.to_json() for result in results],
    }
