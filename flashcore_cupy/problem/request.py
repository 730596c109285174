"""One call's arguments, from the caller's arrays to a problem, a kernel and a plan."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from flashcore_cupy.cuda import captures
from flashcore_cupy.cuda.driver import binding, checked
from flashcore_cupy.jit import compiler
from flashcore_cupy.launch.plan import Place, Plan, Prepared, make_plan, prepare
from flashcore_cupy.problem import interop, varlen
from flashcore_cupy.problem.array_spec import (
    ArraySpec,
    check_elements,
    check_out,
    check_overlaps,
    spec_of,
    spec_of_copy,
    usable,
    why_copied,
)
from flashcore_cupy.problem.attention_problem import (
    GATES,
    AttentionProblem,
    Causal,
    Gate,
    Layout,
    check_choice,
    check_dimensions,
    describe,
    operand,
)
from flashcore_cupy.problem.blocks import Scores
from flashcore_cupy.problem.mods import check_mod_args, check_mods
from flashcore_cupy.problem.rule_arrays import few_numbers, rule_array
from flashcore_cupy.problem.rules import describe_rules
from flashcore_cupy.problem.values import check_flag, shown
from flashcore_cupy.select.config import check_overrides
from flashcore_cupy.select.registry import KERNELS
from flashcore_cupy.select.selector import select
from flashcore_cupy.settings import kernels_override

_DEFAULT_STREAMS = 2  # the handles 0, 1 and 2: default, legacy, per thread

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
        """The same with plain flags and numbers, its arrays as CuPy, or on the CPU NumPy, has them.

        For a GPU: with q's device current.
        """
        given = {} if self.mod_args is None else self.mod_args
        check_mod_args(given, self.score_mod, self.mask_mod)
        mod_args = {name: rule_array(f"mod_args[{name!r}]", x, cpu) for name, x in given.items()}
        arrays = {name: rule_array(name, getattr(self, name), cpu) for name in ("bias", "mask")}
        for name in ("alibi_slopes", "sink"):
            arrays[name] = few_numbers(name, getattr(self, name), cpu)
        plain = {
            name: interop.plain_number(name, getattr(self, name))
            for name in ("softmax_scale", "softcap")
        }
        for name in ("causal", "batch_invariant"):
            flag = getattr(self, name)
            plain[name] = bool(flag) if isinstance(flag, np.bool_) else flag
        return replace(self, mod_args=mod_args or None, **arrays, **plain)

    def describe(self, q: Any, k: Any, v: Any) -> tuple[AttentionProblem, Boundaries]:
        """The problem, every argument checked, and the boundaries of packed sequences."""
        for name, x in (("q", q), ("k", k), ("v", v)):
            check_elements(name, x)
        specs = [spec_of_copy(x) if why_copied(x) else spec_of(x) for x in (q, k, v)]
        sequences = self._boundaries(q, k, v)
        count = None if sequences is None else len(sequences[0]) - 1
        rules = (self.softmax_scale, self.causal, self.gate, self.layout, count,
                 self.batch_invariant)  # fmt: skip
        problem = _described(*specs, *(_Exact.of(x) for x in rules))
        sizes = Scores(problem.batch, problem.heads_q, problem.seqlen_q, problem.seqlen_kv)
        mods: dict[str, Any] = {}
        if isinstance(q, np.ndarray):  # there they are callables
            check_mods(self.score_mod, self.mask_mod, self.mod_args)
        else:
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

    def _boundaries(self, q: Any, k: Any, v: Any) -> Boundaries:
        """Where packed sequences start, if they are packed."""
        if self.cu_seqlens_q is None and self.cu_seqlens_k is None:
            return None
        for name, x in (("q", q), ("k", k), ("v", v)):
            check_dimensions(name, x, self.layout, packed=True)
        sequences = varlen.boundaries(self.cu_seqlens_q, self.cu_seqlens_k, len(q), len(k))
        for name, x in zip(("cu_seqlens_q", "cu_seqlens_k"), sequences or (), strict=False):
            if isinstance(q, np.ndarray) and not isinstance(x, np.ndarray):
                raise TypeError(f"{name}: a CuPy array while q is a NumPy array; use NumPy's")
        return sequences

    def check_apart(self, out: Any) -> None:
        """Raise ``ValueError`` if ``out`` shares memory with an array that rules read."""
        arrays = {name: getattr(self, name) for name in ("alibi_slopes", "bias", "mask", "sink")}
        arrays |= {f"mod_args[{name!r}]": x for name, x in (self.mod_args or {}).items()}
        check_overlaps(out, {name: x for name, x in arrays.items() if x is not None})

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
            arrays |= zip(names, map(varlen.on_gpu, sequences), strict=True)
        return {name: array for name, array in arrays.items() if array is not None}


#: All that attention() takes by name.
ARGUMENTS = (
    "q",
    "k",
    "v",
    *(field.name for field in fields(Request)),
    "return_lse",
    "out",
    "stream",
)


def bind(
    request: Request, q: Any, k: Any, v: Any, out: Any, *, want_lse: bool, own_workspace: bool
) -> Plan:
    """Check everything, build and load the kernel if need be, and bind it to CuPy arrays."""
    import cupy

    request = request.taken(cpu=False)
    problem, sequences = request.describe(q, k, v)
    q, k, v = (usable(x, cupy) for x in (q, k, v))
    if out is None:
        out = cupy.empty(problem.output_shape, q.dtype)
    else:
        check_out(problem, out, (q, k, v), cupy)
        request.check_apart(out)
    changes = check_overrides(request.config or {})
    check_choice("kernel", request.kernel, ("auto", *KERNELS))
    prepared = _prepare(
        problem, spec_of(out), place_of(q.device.id), request.kernel, tuple(changes.items())
    )
    return make_plan(
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


def select_for(request: Request, q: Any, k: Any, v: Any, out: Any = None) -> str:
    """What ``explain`` says of a call on CuPy arrays."""
    request = request.taken(cpu=False)
    problem, _ = request.describe(q, k, v)
    if out is not None:
        import cupy

        check_out(problem, out, (q, k, v), cupy)
        request.check_apart(out)
    arch = compiler.device_arch(q.device.id)
    selection = select(problem, arch, kernel=request.kernel, overrides=request.config)
    lines = selection.explained(arch)
    lines += [
        f"copied {name}: {why_copied(x)}"
        for name, x in (("q", q), ("k", k), ("v", v))
        if why_copied(x)
    ]
    return "\n".join(lines)


def check_on_host(request: Request, q: Any, k: Any, v: Any, out: Any) -> None:
    """Check a call on NumPy arrays as far as that goes without its work."""
    request = request.taken(cpu=True)
    problem, _ = request.describe(q, k, v)
    if out is not None:
        check_out(problem, out, (q, k, v), np)
        request.check_apart(out)


def check_results(gate: Any, return_lse: Any, out: Any) -> bool:
    """Check what a call is to return; whether the log-sum-exp is part of it."""
    want_lse = check_flag("return_lse", return_lse)
    check_choice("gate", gate, GATES)
    if gate in ("qk", "softmax") and (want_lse or out is not None):
        name = "return_lse" if want_lse else "out"
        raise ValueError(f"{name}: gate {gate!r} stops before the output; leave one of them out")
    return want_lse


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
        with _taken_stream(stream, gpu):
            yield


def place_of(device: int) -> Place:
    """Where a call on a device runs, and what it is built from."""
    return Place(device, compiler.device_arch(device), _multiprocessors(device), kernels_override())


@functools.cache
def _multiprocessors(device: int) -> int:
    import cupy

    return int(cupy.cuda.Device(device).attributes["MultiProcessorCount"])


@functools.lru_cache(maxsize=4096)
def _prepare(
    problem: AttentionProblem,
    out: ArraySpec,
    place: Place,
    kernel: str,
    changes: tuple[tuple[str, int | bool], ...],
) -> Prepared:
    """Everything about a call but its addresses: the same for the next call of this shape."""
    selection = select(problem, place.arch, kernel=kernel, overrides=dict(changes))
    o = operand("o", out, "packed" if problem.packed else problem.layout, out.address)
    return prepare(problem, selection, o, place)


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


def _spec(x: Any) -> ArraySpec | None:
    return None if x is None else spec_of(x)


def _taken_stream(stream: Any, gpu: int) -> Any:
    """A stream as CuPy has it; ``TypeError`` or ``ValueError`` for what is none of this GPU's."""
    import cupy

    own = getattr(stream, "device_index", None)  # torch's streams say it themselves
    if not isinstance(stream, cupy.cuda.Stream | cupy.cuda.ExternalStream):
        handle = getattr(stream, "__cuda_stream__", None)
        if handle is None and not hasattr(stream, "cuda_stream"):  # torch's before 2.8
            raise TypeError(
                f"stream: got {shown(stream)}; use a CuPy stream or an object with __cuda_stream__"
            )
        from_external = getattr(cupy.cuda.Stream, "from_external", None)
        if handle is None or from_external is None:  # CuPy before 14.1
            stream = cupy.cuda.ExternalStream(handle()[1] if handle else stream.cuda_stream)
        else:
            stream = from_external(stream)
    own = _gpu_of_stream(stream) if own is None else own
    if own not in (None, gpu):
        raise ValueError(f"stream: of GPU {own}, but q is on GPU {gpu}; use a stream of that one")
    return stream


def _gpu_of_stream(stream: Any) -> int | None:
    """The GPU that a CuPy stream belongs to; None for default streams, which every GPU has."""
    if stream.ptr <= _DEFAULT_STREAMS:
        return None
    if stream.device_id >= 0:
        return int(stream.device_id)
    if captures.is_capturing(stream.ptr):  # which the question might end
        return None
    try:
        (gpu,) = checked(binding().cuStreamGetDevice(stream.ptr), "stream")
    except (AttributeError, RuntimeError):  # cuda-bindings or a driver before 12.8, or none
        return None
    return int(gpu)
