"""The launch cache: a repeated call looks up its launch, patches the addresses, and launches.

What a first call finds out (problem, kernel, grid, parameters) depends on the arrays' shapes,
strides, dtypes and alignment and on the other arguments alone. They key a dict; a hit costs a few
microseconds, most of them the driver's. Everything else takes the long way, which explains.

Arrays are CuPy's, or tensors of torch's, whose results are torch's memory.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from numbers import Number
from typing import Any

import numpy as np

from flashcore_cupy.launch import tensors
from flashcore_cupy.launch.parameter_block import ParameterBlock
from flashcore_cupy.launch.plan import GpuPlan
from flashcore_cupy.launch.tensor_map import Maps
from flashcore_cupy.launch.workspace import workspace
from flashcore_cupy.problem import interop
from flashcore_cupy.problem.array_spec import span_of
from flashcore_cupy.problem.attention_problem import MAX_ALIGN
from flashcore_cupy.problem.rules import NO_WINDOW
from flashcore_cupy.problem.stream import entered
from flashcore_cupy.select.params import ATTENTION_PARAMS
from flashcore_cupy.settings import arch_override, kernels_override

_SETTLED = (Number, str, type, type(None), np.bool_)  # choices that may key a call
_LIMIT = 4096  # problems remembered; beyond, all are forgotten

_ADDRESSES = struct.Struct("5Q")  # q, k, v, o, lse: the first fields of AttentionParams
assert ATTENTION_PARAMS.names is not None and ATTENTION_PARAMS.fields is not None
assert ATTENTION_PARAMS.names[:5] == ("q", "k", "v", "o", "lse")
_WORKSPACE = struct.Struct("2Q")
_WORKSPACE_OFFSET = ATTENTION_PARAMS.fields["split_partials"][1]

_known: dict[Any, _KnownCall] = {}
# CuPy's, bound when the first call is remembered: until then nothing here needs CuPy.
_ndarray: Any = None
_empty: Any = None
_float32: Any = None
_current_device: Any = None
_set_device: Any = None
_current_stream: Any = None
_is_captured: Any = None
_launch_kernel: Any = None
#: What launches a known call on tensors that require a gradient, if there is something that does.
_differentiate: Callable[..., Any] | None = None
#: How many environment variables there were when the environment was last asked.
_variable_count = -1


def connect(differentiate: Callable[[Any, Any, Any, bool, tuple[Any, ...]], Any]) -> None:
    """Say what launches known calls on tensors that require a gradient.

    It takes q, k, v, return_lse and choices, as ``launch_again`` has them, and may return None.
    """
    global _differentiate
    _differentiate = differentiate


class _KnownCall:
    """All that a call's launch needs besides its arrays' addresses."""

    def __init__(self, plan: GpuPlan) -> None:
        problem, (step,) = plan.problem, plan.steps
        self.output_shape, self.dtype = problem.output_shape, plan.arrays["o"].dtype
        self.lse_shape = problem.lse_shape
        self.geometry = (step.function, step.grid, 1, 1, step.block, 1, 1, step.smem_bytes)
        self.overlapping = step.overlapping
        self.params = step.params
        # First byte of q, k, v, o and the one after the last, relative to the address.
        spans = [span_of(plan.arrays[name], 0) for name in "qkvo"]
        self.spans = tuple(edge for span in spans for edge in span)
        self.maps: Maps | None = None
        if views := plan.views:
            addresses = {name: plan.arrays[name].data.ptr for name in "qkvo"}
            self.maps = Maps(views, addresses, plan.selection.config.params)
        self.workspace_bytes = plan.workspace_bytes if any(plan.workspace_bytes) else None
        #: New results of torch's are like these; they are made when first asked for.
        self.patterns: list[Any] = []
        #: What launches its gradients on tensors, by what that depends on besides.
        self.gradients: dict[Any, Any] = {}
        # A call takes one and puts it back, so that threads never share one.
        self.blocks: list[_BoundBlock] = []

    def overlaps(self, q: int, k: int, v: int, o: int) -> bool:
        """Whether the output's span at address o meets that of an input."""
        q0, q1, k0, k1, v0, v1, first, end = self.spans
        first += o
        end += o
        return (
            (q + q0 < end and first < q + q1)
            or (k + k0 < end and first < k + k1)
            or (v + v0 < end and first < v + v1)
        )


class _BoundBlock:
    """A parameter block, and the addresses that it holds: of q, k, v, o, lse."""

    __slots__ = ("addresses", "block")

    def __init__(self, block: ParameterBlock) -> None:
        self.block = block
        self.addresses: tuple[int, ...] = ()

    def move(self, addresses: tuple[int, int, int, int, int], maps: Maps | None) -> None:
        """Have the parameters hold other addresses."""
        _ADDRESSES.pack_into(self.block.words, 0, *addresses)
        if maps is not None:
            maps.move(self.block, *addresses[:4])
        self.addresses = addresses


def remember(plan: GpuPlan, choices: tuple[Any, ...], *, out_given: bool, given: Any = ()) -> None:
    """Keep what was found out for a call without rule arrays, if one launch is all that it is.

    ``given``: q, k and v as the caller gave them.
    """
    global _ndarray, _empty, _float32, _launch_kernel, _variable_count
    global _current_device, _set_device, _current_stream, _is_captured
    if len(plan.steps) != 1 or plan.problem.gate is not None or is_overridden():
        return
    if not are_settled((*choices[0], *choices[1:])):
        return
    if _ndarray is None:
        import cupy

        _ndarray, _empty, _float32 = cupy.ndarray, cupy.empty, cupy.dtype("float32")
        _current_device = cupy.cuda.runtime.getDevice
        _set_device = cupy.cuda.runtime.setDevice
        _current_stream = cupy.cuda.get_current_stream
        _is_captured = cupy.cuda.runtime.streamIsCapturing
        _launch_kernel = cupy.cuda.driver.launchKernel
    q, k, v, o = (plan.arrays[name] for name in "qkvo")
    addresses = q.data.ptr | k.data.ptr | v.data.ptr
    if not out_given and _misaligned(o.data.ptr):
        return  # others would get a kernel that is built for less
    out, lse = o if out_given else None, "lse" in plan.arrays
    key = _key(q, k, v, out, addresses, lse, q.data.device_id, choices)
    try:
        hash(key)
    except TypeError:  # a list as the window is legal, but keys nothing
        return
    if len(_known) >= _LIMIT:
        _known.clear()
    _variable_count = len(os.environ)
    _known[key] = known = _KnownCall(plan)
    if not out_given and tensors.connect(given):
        places = [x.data_ptr() for x in given]
        if places == [x.data.ptr for x in (q, k, v)]:  # none was copied
            _known[_tensor_key(given, addresses, lse, q.data.device_id, choices)] = known


def launch_again(
    q: Any, k: Any, v: Any, out: Any, return_lse: bool, choices: tuple[Any, ...]
) -> Any:
    """Launch a call that is remembered and return its result; None if it is not."""
    if not (q.__class__ is k.__class__ is v.__class__ is _ndarray):
        return None if out is not None else _launch_tensors(q, k, v, return_lse, choices)
    if out is not None and out.__class__ is not _ndarray:
        return None
    pq, pk, pv, po = q.data.ptr, k.data.ptr, v.data.ptr, 0 if out is None else out.data.ptr
    device = _current_device()
    try:
        known = _known.get(_key(q, k, v, out, pq | pk | pv, return_lse, device, choices))
    except TypeError:  # an argument that cannot be hashed, or is wrong: for the long way
        return None
    if known is None or is_other_environment():
        return None
    stream = _current_stream().ptr
    if stream > 1 and _is_captured(stream):
        return None  # what it allocates is the graph's
    if out is None:
        out = _empty(known.output_shape, known.dtype)
        po = out.data.ptr
        if _misaligned(po):
            return None
    lse = _empty(known.lse_shape, _float32) if return_lse else None
    addresses = (pq, pk, pv, po, 0 if lse is None else lse.data.ptr)
    bound = known.blocks.pop() if known.blocks else _BoundBlock(known.params.copy())
    if bound.addresses != addresses:
        if known.overlaps(pq, pk, pv, po) or not _all_on(device, q, k, v, out):
            known.blocks.append(bound)
            return None  # the long way looks closer, or says what is wrong
        bound.move(addresses, known.maps)
    _launch(known, bound, device, stream)
    return out if lse is None else (out, lse)


def _launch_tensors(q: Any, k: Any, v: Any, return_lse: bool, choices: tuple[Any, ...]) -> Any:
    """``launch_again`` for tensors; the results are, too."""
    if tensors.differentiates(q, k, v):
        return _differentiate and _differentiate(q, k, v, return_lse, choices)
    found = find_tensors(q, k, v, return_lse, choices)
    made = None if found is None else found.launch(q, return_lse)
    if made is None:
        return None
    out, lse = made
    return out if lse is None else (out, lse)


def find_tensors(
    q: Any, k: Any, v: Any, return_lse: bool, choices: tuple[Any, ...]
) -> FoundTensors | None:
    """A call on tensors, if it is remembered; whether they require a gradient is not looked at."""
    place = tensors.place((q, k, v), gradients=True)
    if place is None or tensors.is_cast(q.dtype):
        return None
    device, stream = place
    addresses = pq, pk, pv = q.data_ptr(), k.data_ptr(), v.data_ptr()
    key = _tensor_key((q, k, v), pq | pk | pv, return_lse, device, choices)
    try:
        known = _known.get(key)
    except TypeError:  # an argument that cannot be hashed, or is wrong: for the long way
        return None
    if known is None or is_other_environment():
        return None
    return FoundTensors(known, key, addresses, device, stream)


class FoundTensors:
    """A call on tensors that is remembered, at the addresses that it has this time."""

    __slots__ = ("addresses", "device", "key", "known", "stream")

    def __init__(
        self,
        known: _KnownCall,
        key: tuple[Any, ...],
        addresses: tuple[int, ...],
        device: int,
        stream: int,
    ) -> None:
        self.known, self.key, self.addresses = known, key, addresses
        self.device, self.stream = device, stream

    @property
    def choices(self) -> tuple[Any, ...]:
        """As ``launch_again`` has got them."""
        choices: tuple[Any, ...] = self.key[4]
        return choices

    def launch(self, q: Any, return_lse: bool) -> tuple[Any, Any] | None:
        """Launch it; returns the output, and the log-sum-exp or None. Their addresses are kept.

        None where an allocator has given memory that is not as the kernel is built for.
        """
        known, device, stream = self.known, self.device, self.stream
        if not known.patterns:
            known.patterns = [
                tensors.pattern(q, known.output_shape),
                tensors.pattern(q, known.lse_shape, float32=True),
            ]
        if return_lse:
            out, lse = tensors.like(known.patterns)
        else:
            (out,), lse = tensors.like(known.patterns[:1]), None
        addresses = (*self.addresses, out.data_ptr(), 0 if lse is None else lse.data_ptr())
        if _misaligned(addresses[3]):
            return None
        self.addresses = addresses
        bound = known.blocks.pop() if known.blocks else _BoundBlock(known.params.copy())
        if bound.addresses != addresses:
            bound.move(addresses, known.maps)
        if known.workspace_bytes is None or _current_stream().ptr == stream:
            _launch(known, bound, device, stream)
        else:  # a workspace is CuPy's, and its current stream's
            with entered(device, interop.stream_of(q)):
                _launch(known, bound, device, stream)
        return out, lse

    def holds(self, q: Any, k: Any, v: Any, o: Any, lse: Any) -> bool:
        """Whether these are what was launched, where it was, and in the same strides."""
        return (
            self.addresses
            == (q.data_ptr(), k.data_ptr(), v.data_ptr(), o.data_ptr(), lse.data_ptr())
            and self.key[0] == tensors.forms(q, k, v)
            and o.is_contiguous()
            and lse.is_contiguous()
        )


def _launch(known: _KnownCall, bound: _BoundBlock, device: int, stream: int) -> None:
    """Hand a call to the driver, and put its block back."""
    if known.workspace_bytes is not None:
        area = workspace(*known.workspace_bytes)
        _WORKSPACE.pack_into(bound.block.words, _WORKSPACE_OFFSET, area.partials, area.counters)
    _set_device(device)  # as enter_context() does, for a new thread
    if known.overlapping is None:
        _launch_kernel(*known.geometry, stream, bound.block.address, 0)
    else:
        known.overlapping(stream, bound.block.address)
    known.blocks.append(bound)


def _misaligned(address: int) -> bool:
    """Whether an allocator has given memory that is not as the kernels are built for."""
    return address % MAX_ALIGN != 0


def _all_on(device: int, *arrays: Any) -> bool:
    return all(x.data.device_id == device for x in arrays)


def _key(
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    addresses: int,
    return_lse: bool,
    device: int,
    choices: tuple[Any, ...],
) -> tuple[Any, ...]:
    """All that a launch depends on but the addresses themselves.

    ``addresses``: the union of those of q, k and v, for the least aligned of them decides how wide
    loads are. out's own decides how wide stores are.

    ``choices``: the window, then others and their classes, for True and 1 are equal, but not the
    same argument.

    A tuple of sizes takes as long to make as all else here, and most arrays are contiguous. (That
    is CuPy's own name for it; the public flags.c_contiguous takes longer than the strides.)
    """
    return (
        q.shape, q._c_contiguous or q.strides, q.dtype,
        k.shape, k._c_contiguous or k.strides, k.dtype,
        v.shape, v._c_contiguous or v.strides, v.dtype,
        None if out is None else (
            out.shape, out._c_contiguous or out.strides, out.dtype, out.data.ptr % MAX_ALIGN
        ),
        addresses % MAX_ALIGN, return_lse, device, choices,
        None if choices[0] is NO_WINDOW else tuple(map(type, choices[0])),
    )  # fmt: skip


def _tensor_key(
    given: tuple[Any, Any, Any],
    addresses: int,
    return_lse: bool,
    device: int,
    choices: tuple[Any, ...],
) -> tuple[Any, ...]:
    """The same of tensors q, k and v, which have no output yet."""
    return (
        tensors.forms(*given), addresses % MAX_ALIGN, return_lse, device, choices,
        None if choices[0] is NO_WINDOW else tuple(map(type, choices[0])),
    )  # fmt: skip


def are_settled(choices: tuple[Any, ...]) -> bool:
    """Whether choices may key a call. A tensor can be hashed, but may be another number later."""
    return all(isinstance(x, _SETTLED) for x in choices)


def is_overridden() -> bool:
    """Whether the environment asks for other kernels or another target."""
    return kernels_override() is not None or arch_override() is not None


def is_other_environment() -> bool:
    """Whether what is remembered does not hold in the environment as it is."""
    return len(os.environ) != _variable_count and _environment_changed()


def _environment_changed() -> bool:
    """Whether the environment has come to ask for other kernels or another target.

    Nothing is remembered while it does. To read two variables takes a microsecond of each call, to
    count them all next to nothing. So they are read only when the count has changed, as it has when
    one of the two is set.
    """
    global _variable_count
    if is_overridden():
        _variable_count = -1  # to be asked again at each call
        return True
    _variable_count = len(os.environ)
    return False
