"""One call's arguments, from the caller's arrays to a problem, a kernel and a plan."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from flashcore_cupy import interop, jit, launch, packed
from flashcore_cupy.arrays import (
    ArraySpec,
    check_elements,
    check_out,
    spec_of,
    spec_of_copy,
    usable,
    why_copied,
)
from flashcore_cupy.config import check_overrides
from flashcore_cupy.problem import (
    AttentionProblem,
    Causal,
    Gate,
    Layout,
    check_choice,
    describe,
    operand,
)
from flashcore_cupy.rules import Scores, check_mod_args, describe_rules
from flashcore_cupy.settings import kernels_override
from flashcore_cupy.tiles import KERNELS, select

Boundaries = tuple[Any, Any] | None
"""Where packed sequences start in q, and in k and v; None if they are not packed."""


@dataclass
class Request:
    """``attention``'s arguments besides q, k, v, out, return_lse and stream."""

    layout: Layout = "bhsd"
    softmax_scale: float | None = None
    causal: Causal = False
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    alibi_slopes: Any = None
    bias: Any = None
    mask: Any = None
    sink: Any = None
    score_mod: Any = None
    mask_mod: Any = None
    mod_args: Mapping[str, Any] | None = None
    cu_seqlens_q: Any = None
    cu_seqlens_k: Any = None
    batch_invariant: bool = False
    kernel: str = "auto"
    config: Mapping[str, object] | None = None
    gate: Gate | None = None

    def taken(self, cpu: bool) -> Request:
        """The same with the rules' arrays as CuPy has them, or on the CPU as NumPy has them."""
        given = {} if self.mod_args is None else self.mod_args
        check_mod_args(given, self.score_mod, self.mask_mod)
        mod_args = {name: _rule_array(f"mod_args[{name!r}]", x, cpu) for name, x in given.items()}
        arrays = {
            name: _rule_array(name, getattr(self, name), cpu)
            for name in ("alibi_slopes", "bias", "mask", "sink")
        }
        return replace(self, mod_args=mod_args or None, **arrays)

    def describe(self, q: Any, k: Any, v: Any) -> tuple[AttentionProblem, Boundaries]:
        """The problem, every argument checked, and the boundaries of packed sequences."""
        for name, x in (("q", q), ("k", k), ("v", v)):
            check_elements(name, x)
        specs = [spec_of_copy(x) if why_copied(x) else spec_of(x) for x in (q, k, v)]
        sequences = self._boundaries(q, k)
        count = None if sequences is None else len(sequences[0]) - 1
        rules = (self.softmax_scale, self.causal, self.gate, self.layout, count,
                 self.batch_invariant)  # fmt: skip
        problem = _described(*specs, *(_Exact.of(x) for x in rules))
        sizes = Scores(problem.batch, problem.heads_q, problem.seqlen_q, problem.seqlen_kv)
        mods: dict[str, Any] = {}
        if not isinstance(q, np.ndarray):  # there they are callables, which their own rules check
            mods = {"score_mod": self.score_mod, "mask_mod": self.mask_mod}
            mods["mod_args"] = {name: spec_of(x) for name, x in (self.mod_args or {}).items()}
        described = describe_rules(
            sizes,
            problem.dtype,
            window=self.window,
            softcap=self.softcap,
            alibi_slopes=_spec(self.alibi_slopes),
            bias=_spec(self.bias),
            mask=_spec(self.mask),
            sink=_spec(self.sink),
            packed=problem.packed,
            **mods,
        )
        return replace(problem, rules=described), sequences

    def _boundaries(self, q: Any, k: Any) -> Boundaries:
        """Where packed sequences start, if they are packed."""
        total_q, total_k = (x.shape[0] if x.ndim else 0 for x in (q, k))
        sequences = packed.boundaries(self.cu_seqlens_q, self.cu_seqlens_k, total_q, total_k)
        for name, x in zip(("cu_seqlens_q", "cu_seqlens_k"), sequences or (), strict=False):
            if isinstance(q, np.ndarray) and not isinstance(x, np.ndarray):
                raise TypeError(f"{name}: a CuPy array while q is a NumPy array; use NumPy's")
        return sequences

    def extras(self, sequences: Boundaries, cupy: Any) -> dict[str, Any]:
        """The rules' arrays on the GPU, by their names in ``AttentionParams``."""
        arrays = {
            "alibi": self.alibi_slopes,
            "bias": self.bias,
            "mask": self.mask,
            "sink": None if self.sink is None else usable(self.sink, cupy),
        }
        if sequences is not None:
            names = ("cu_seqlens_q", "cu_seqlens_kv")
            arrays |= zip(names, map(packed.on_gpu, sequences), strict=True)
        return {name: array for name, array in arrays.items() if array is not None}


def bind(
    request: Request, q: Any, k: Any, v: Any, out: Any, *, want_lse: bool, own_workspace: bool
) -> launch.Plan:
    """Check everything, build and load the kernel if need be, and bind it to CuPy arrays."""
    import cupy

    _check_gpu(q, k, v)
    request = request.taken(cpu=False)
    problem, sequences = request.describe(q, k, v)
    q, k, v = (usable(x, cupy) for x in (q, k, v))
    if out is None:
        out = cupy.empty(problem.output_shape, q.dtype)
    else:
        check_out(problem, out, (q, k, v), cupy)
    changes = check_overrides(request.config or {})
    check_choice("kernel", request.kernel, ("auto", *KERNELS))
    prepared = _prepare(
        problem, spec_of(out), place_of(q.device.id), request.kernel, tuple(changes.items())
    )
    return launch.make_plan(
        prepared,
        q,
        k,
        v,
        out,
        want_lse=want_lse,
        extras=request.extras(sequences, cupy),
        mod_args=tuple((request.mod_args or {}).values()),
        own_workspace=own_workspace,
    )


def select_for(request: Request, q: Any, k: Any, v: Any) -> str:
    """What ``explain`` says of a call on CuPy arrays."""
    _check_gpu(q, k, v)
    problem, _ = request.taken(cpu=False).describe(q, k, v)
    arch = jit.device_arch(q.device.id)
    selection = select(problem, arch, kernel=request.kernel, overrides=request.config)
    lines = [f"{selection.kernel.name} on {arch}: {selection.config.describe()}"]
    lines += [f"passed over {name}: {reason}" for name, reason in selection.passed_over]
    lines += [
        f"copied {name}: {why_copied(x)}"
        for name, x in (("q", q), ("k", k), ("v", v))
        if why_copied(x)
    ]
    return "\n".join(lines)


def refuse_gpu_arguments(request: Request, stream: Any) -> None:
    """Raise ``ValueError`` for what chooses how a GPU runs, given with arrays of the host."""
    check_choice("kernel", request.kernel, ("auto", *KERNELS))
    given = {
        "kernel": request.kernel != "auto",
        "config": request.config is not None,
        "stream": stream is not None,
    }
    for name, present in given.items():
        if present:
            raise ValueError(
                f"{name}: chooses how a GPU runs, but q, k, v are NumPy arrays; "
                f"leave it out, or pass CuPy arrays"
            )


@contextlib.contextmanager
def entered(gpu: int, stream: Any) -> Iterator[None]:
    """A GPU and the caller's stream, current."""
    import cupy

    with cupy.cuda.Device(gpu):
        if stream is None:
            yield
            return
        if not isinstance(stream, cupy.cuda.Stream | cupy.cuda.ExternalStream):
            if not hasattr(stream, "__cuda_stream__"):
                raise TypeError(
                    f"stream: got {type(stream).__name__}; use a CuPy stream or an object with "
                    f"__cuda_stream__"
                )
            stream = _stream_of(stream, cupy)
        with stream:
            yield


def place_of(device: int) -> launch.Place:
    """Where a call on a device runs, and what it is built from."""
    return launch.Place(
        device, jit.device_arch(device), _multiprocessors(device), kernels_override()
    )


@functools.cache
def _multiprocessors(device: int) -> int:
    import cupy

    return int(cupy.cuda.Device(device).attributes["MultiProcessorCount"])


@functools.lru_cache(maxsize=4096)
def _prepare(
    problem: AttentionProblem,
    out: ArraySpec,
    place: launch.Place,
    kernel: str,
    changes: tuple[tuple[str, int | bool], ...],
) -> launch.Prepared:
    """Everything about a call but its addresses: the same for the next call of this shape."""
    selection = select(problem, place.arch, kernel=kernel, overrides=dict(changes))
    o = operand("o", out, "packed" if problem.packed else problem.layout, out.address)
    return launch.prepare(problem, selection, o, place)


@dataclass(frozen=True)
class _Exact:
    """An argument as a part of a key: True and 1 are not the same argument."""

    kind: type
    value: Any

    @classmethod
    def of(cls, value: Any) -> _Exact:
        return cls(type(value), value)


def _described(*key: Any) -> AttentionProblem:
    try:
        return _describe_once(*key)
    except TypeError as error:
        if "unhashable" not in str(error):
            raise
        return _describe_once.__wrapped__(*key)  # which says what is wrong with the argument


@functools.lru_cache(maxsize=4096)
def _describe_once(q: ArraySpec, k: ArraySpec, v: ArraySpec, *rules: _Exact) -> AttentionProblem:
    softmax_scale, causal, gate, layout, sequences, batch_invariant = (x.value for x in rules)
    return describe(
        *(q, k, v),
        softmax_scale=softmax_scale,
        causal=causal,
        gate=gate,
        layout=layout,
        sequences=sequences,
        batch_invariant=batch_invariant,
        addresses=(q.address, k.address, v.address),
    )


def _rule_array(name: str, x: Any, cpu: bool) -> Any:
    if x is None:
        return None
    array, _ = interop.taken(name, x)
    if isinstance(array, np.ndarray) != cpu:
        here, there = ("NumPy", "CuPy") if cpu else ("CuPy", "NumPy")
        raise TypeError(f"{name}: a {there} array while q is a {here} array; put both in one place")
    check_elements(name, array)
    return array


def _spec(x: Any) -> ArraySpec | None:
    return None if x is None else spec_of(x)


def _check_gpu(q: Any, k: Any, v: Any) -> None:
    for name, x in (("k", k), ("v", v)):
        if x.device != q.device:
            raise ValueError(
                f"{name}: on GPU {x.device.id}, but q is on GPU {q.device.id}; q, k, v share one"
            )


def _stream_of(owner: Any, cupy: Any) -> Any:
    from_external = getattr(cupy.cuda.Stream, "from_external", None)
    if from_external is None:  # CuPy before 14.1
        return cupy.cuda.ExternalStream(owner.__cuda_stream__()[1])
    return from_external(owner)
