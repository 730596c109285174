"""The correctness matrix on this machine's GPU: what is tried is in `selftest_cases`, how is here.

Every case puts its inputs into larger buffers full of NaN, starts its outputs as NaN, launches
twice, and wants the same bits, an untouched surrounding, and the result that `verify` expects.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from flashcore_cupy import builds, jit, tiles, verify
from flashcore_cupy.attention import plan
from flashcore_cupy.bench import inputs, machine
from flashcore_cupy.config import KernelConfig
from flashcore_cupy.numpy_attention import Array
from flashcore_cupy.problem import AttentionProblem, describe
from flashcore_cupy.selftest_cases import Case, cases

if TYPE_CHECKING:
    from flashcore_cupy.launch import Plan

__all__ = ["Case", "CaseResult", "cases", "run_all", "run_case"]

#: NaN elements before and after every array. 64 keeps what follows aligned.
_GUARD = 64
_QUICK = 7  # no multiple of the 2 and 3 by which choices rotate
#: Elements between the end of a row and the next one.
_PADDING = {"strided": 8, "align8": 4, "align4": 2, "misaligned": 1}


@dataclass(frozen=True)
class CaseResult:
    """How a case went. Errors are absolute; None where it did not get that far."""

    case: Case
    ok: bool
    max_error: float | None
    allowed_error: float | None
    reason: str
    """Why it is not ok; empty if it is."""

    def to_json(self) -> dict[str, Any]:
        """Return a row of the report."""
        return {
            "kernel": self.case.kernel,
            "dtype": self.case.dtype,
            "head_dim": self.case.head_dim,
            "case": self.case.name,
            "ok": self.ok,
            "max_error": self.max_error,
            "allowed_error": self.allowed_error,
            "reason": self.reason,
        }


@dataclass(frozen=True)
class Embedded:
    """An array inside a larger buffer that is NaN elsewhere; offset and strides in elements."""

    buffer: Array
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def on_host(self) -> Array:
        """The array as a view of ``buffer``."""
        strides = [s * self.buffer.itemsize for s in self.strides]
        return as_strided(self.buffer[self.offset :], self.shape, strides)

    def on_gpu(self) -> tuple[Any, Any]:
        """Copy the buffer to the GPU; return the copy and the array as a view of it."""
        import cupy

        buffer = cupy.asarray(self.buffer)
        size = self.buffer.itemsize
        view = cupy.ndarray(
            self.shape,
            self.buffer.dtype,
            memptr=buffer.data + self.offset * size,
            strides=tuple(s * size for s in self.strides),
        )
        return buffer, view

    def surroundings_are_nan(self, buffer: Array) -> bool:
        """Whether nothing but the array was written in a copy of the buffer."""
        outside = np.isnan(buffer.astype(np.float32))
        view = as_strided(
            outside[self.offset :], self.shape, [s * outside.itemsize for s in self.strides]
        )
        view[...] = True
        return bool(outside.all())


def embed(shape: tuple[int, ...], dtype: Any, view: str, *, like: Array | None = None) -> Embedded:
    """Lay out an array as a case's ``view`` says, filled from ``like`` or NaN.

    "contiguous": as NumPy would. "strided": rows 8 elements apart, heads a row apart. "align8",
    "align4", "misaligned": rows 4, 2, 1 elements apart, so that fewer bytes are aligned.
    "transposed": the last axis is not the contiguous one.
    """
    offset, strides, size = _lie(shape, view)
    embedded = Embedded(np.full(size, np.nan, dtype), offset, shape, strides)
    if like is not None:
        embedded.on_host()[...] = like
    return embedded


def _lie(shape: tuple[int, ...], view: str) -> tuple[int, tuple[int, ...], int]:
    """Offset, strides and size of the buffer of an array in a view, elements."""
    lengths = (*shape[:2], shape[3], shape[2]) if view == "transposed" else shape
    padding = _PADDING.get(view, 0)
    row, rows = lengths[3] + padding, lengths[2] + (padding > 0)
    strides = (lengths[1] * rows * row, rows * row, row, 1)
    if view == "transposed":
        strides = (*strides[:2], 1, row)
    offset = _GUARD + (view == "misaligned")
    return offset, strides, offset + lengths[0] * lengths[1] * rows * row + _GUARD


@dataclass(frozen=True)
class _Setup:
    """A case's inputs, canonical and as they will lie on the GPU, and its output's place."""

    host: tuple[Array, Array, Array]
    embedded: tuple[Embedded, Embedded, Embedded]
    out: Embedded


def _set_up(case: Case) -> _Setup:
    host = inputs(case.problem(), case.seed, case.kind)
    dtype = host[0].dtype

    def laid_out(x: Array) -> Embedded:
        y = x if case.layout == "bhsd" else x.transpose(0, 2, 1, 3)
        return embed(y.shape, dtype, case.view, like=y)

    q, k, v = (laid_out(x) for x in host)
    out_view = "contiguous" if case.view == "transposed" else case.view
    out = embed(case.shape_of("o"), dtype, out_view)
    return _Setup(host, (q, k, v), out)


def case_config(case: Case, arch: str) -> tuple[KernelConfig, ...]:
    """What a case compiles; ``ValueError`` if the kernel refuses it on this target."""
    selection = tiles.select(_described(case), arch, kernel=case.kernel)
    return tiles.configs_of(selection)


def _described(case: Case) -> AttentionProblem:
    """The problem with its strides and alignment, from arrays that are never filled."""
    specs = [_Spec.of(case, name) for name in "qkv"]
    return describe(
        *specs,
        causal=case.causal,
        gate=case.gate,
        layout=case.layout,
        addresses=[spec.address for spec in specs],
    )


@dataclass(frozen=True)
class _Spec:
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: Any
    address: int
    ndim: int = 4

    @classmethod
    def of(cls, case: Case, name: str) -> _Spec:
        shape = case.shape_of(name)
        view = "contiguous" if case.view == "transposed" else case.view  # launched as a copy
        dtype = np.dtype(case.numpy_dtype())
        offset, strides, _ = _lie(shape, view)
        size = dtype.itemsize
        return cls(shape, tuple(s * size for s in strides), dtype, offset * size)


def run_case(case: Case) -> CaseResult:
    """Run one case on the current GPU. A kernel that fails gives a result that is not ok."""
    import cupy

    setup = _set_up(case)
    try:
        launched = _launch(case, setup)
    except (ValueError, jit.CompileError, cupy.cuda.runtime.CUDARuntimeError) as error:
        return CaseResult(case, False, None, None, str(error).splitlines()[0])
    return judge(case, setup.host, launched)


@dataclass(frozen=True)
class Launched:
    """What a case's launches left, on the host, canonical (B, H, S, ...)."""

    got: Array
    lse: Array | None
    quantized: dict[str, verify.Quantized] | None
    tile: int
    faults: tuple[str, ...] = ()


def _launch(case: Case, setup: _Setup) -> Launched:
    import cupy

    placed = [embedded.on_gpu() for embedded in setup.embedded]
    out_buffer, out = setup.out.on_gpu()
    q, k, v = (view for _, view in placed)
    bound = plan(
        q,
        k,
        v,
        layout=case.layout,
        causal=case.causal,
        gate=case.gate,
        kernel=case.kernel,
        return_lse=case.gate is None,
        out=out,
    )
    if case.gate is None:
        bound.arrays["lse"].fill(np.nan)
    faults: list[str] = []
    first = _outputs(bound, case)
    for _ in range(case.repeats):
        out_buffer.set(setup.out.buffer)
        again = _outputs(bound, case)
        if any(x.tobytes() != y.tobytes() for x, y in zip(first, again, strict=True)):
            faults.append("another launch gave other bits")
            break
    if not setup.out.surroundings_are_nan(cupy.asnumpy(out_buffer)):
        faults.append("wrote beside the output")
    return Launched(
        got=first[0],
        lse=first[1] if len(first) > 1 else None,
        quantized=verify.read_quantized(bound) if bound.selection.kernel.quantizes else None,
        tile=bound.selection.config.tile.block_m,
        faults=tuple(faults),
    )


def _outputs(bound: Plan, case: Case) -> list[Array]:
    """Launch; copy the output or the gate's array, and the log-sum-exp, to the host."""
    import cupy

    bound.launch()
    if case.gate in ("qk", "softmax"):
        return [cupy.asnumpy(bound.gate_output())]
    o = cupy.asnumpy(bound.arrays["o"])
    arrays = [o if case.layout == "bhsd" else o.transpose(0, 2, 1, 3)]
    if "lse" in bound.arrays:
        arrays.append(cupy.asnumpy(bound.arrays["lse"]))
    return arrays


def judge(case: Case, host: tuple[Array, Array, Array], launched: Launched) -> CaseResult:
    """Compare what was launched with what the oracle says about the case's inputs."""
    problem, faults = case.problem(), list(launched.faults)
    if launched.quantized is not None:
        expectation, wrong = verify.expect_quantized(
            problem, *host, launched.quantized, tile=launched.tile
        )
        faults += wrong
    else:
        expectation = verify.expect(problem, *host, tile=launched.tile)
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

    ``on_start(steps, words)`` announces a phase, ``on_step(words)`` each of its steps. Returns a
    mapping with kernels_digest, gpu, driver, nvrtc, cupy, date, passed, failed, emulated, rows.
    """
    announce = on_start or (lambda steps, words: None)
    step = on_step or (lambda words: None)
    arch = jit.device_arch()
    chosen = runnable(cases(), arch)
    chosen = chosen[::_QUICK] if quick else chosen
    wanted = list(dict.fromkeys(c for case in chosen for c in case_config(case, arch)))
    announce(len(wanted), "compiling")
    builds.build_each([(config, arch) for config in wanted], lambda done: step(builds.what(done)))
    announce(len(chosen), "checking")

    results = []
    for case in chosen:
        results.append(run_case(case))
        step(case.kernel)
    return report(results, arch)


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


def report(results: Sequence[CaseResult], arch: str) -> dict[str, Any]:
    """Join results with where they come from; the JSON of `selftest`."""
    passed = sum(result.ok for result in results)
    return {
        **machine(arch).to_json(),
        "passed": passed,
        "failed": len(results) - passed,
        "emulated": False,
        "rows": [result.to_json() for result in results],
    }
