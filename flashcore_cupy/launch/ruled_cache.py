"""The launch cache of calls with rules: masks, biases, mods, dropout, block masks, packed batches.

As ``launch_cache``, for calls that bring more arrays than q, k and v, of one launch or several. The
first three are all CuPy's, or all tensors of torch's; beside tensors there may be arrays of CuPy's,
as the lists of a block mask are. A call is kept when it comes for the second time, for a decoder's
calls, each of another length, never come again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flashcore_cupy.launch import launch_cache, once, tensors
from flashcore_cupy.launch.known_call import KnownCall, maps_in
from flashcore_cupy.launch.plan import GpuPlan
from flashcore_cupy.launch.taken_apart import (
    TakenApart,
    address_of,
    are_on,
    form_of,
    pointers_of,
    take_apart,
)
from flashcore_cupy.launch.workspace import workspace
from flashcore_cupy.problem import interop
from flashcore_cupy.problem.array_spec import span_of
from flashcore_cupy.problem.attention_problem import ITEMSIZE, MAX_ALIGN
from flashcore_cupy.problem.rng import integer_key
from flashcore_cupy.problem.stream import entered

_LIMIT = 4096  # problems remembered; beyond, all are forgotten
_known: dict[Any, _KnownCall] = {}


class _KnownCall(KnownCall):
    """A call with rules; its addresses are those of the inputs, of the results, and of a stream."""

    def __init__(self, plan: GpuPlan, inputs: Sequence[str]) -> None:
        names = [*inputs, "o", *(["lse"] if "lse" in plan.arrays else [])]
        addresses = {name: plan.arrays[name].data.ptr for name in names}
        addresses["rng_key"] = 0  # a number that each call brings as it brings an address
        self.workspace_bytes = plan.workspace_bytes if any(plan.workspace_bytes) else None
        if self.workspace_bytes is not None:
            addresses |= {n: plan.arrays[n].data.ptr for n in ("split_partials", "counters")}
        config, launches = plan.selection.config, plan.prepared_launches
        scratch = config.scratch(plan.problem)
        results = {name: x for name, x in plan.arrays.items() if name in ("o", "lse")}
        super().__init__(
            plan.steps,
            [maps_in(config, plan.views if x.config is config else ()) for x in launches],
            lambda at: [launch.params for launch in plan.launches_at(at)],
            addresses,
            {name: math.prod(shape) * _itemsize(dtype) for name, (shape, dtype) in scratch.items()},
            {name: (x.shape, x.dtype) for name, x in results.items()},
        )
        #: First byte of each input, and the one after the last, relative to its address; o's last.
        self.spans = [span_of(plan.arrays[name], 0) for name in (*inputs, "o")]

    def overlaps(self, inputs: Sequence[int], o: int) -> bool:
        """Whether the output's span at address o meets that of an input."""
        *spans, (first, end) = self.spans
        return any(
            x + begin < o + end and o + first < x + last
            for x, (begin, last) in zip(inputs, spans, strict=True)
        )


def _itemsize(dtype: Any) -> int:
    return ITEMSIZE.get(dtype) or np.dtype(dtype).itemsize


def remember(
    plan: GpuPlan,
    operands: Sequence[Any],
    rules: Mapping[str, Any],
    choices: tuple[Any, ...],
    *,
    mod_args: Sequence[str],
    out_given: bool,
) -> None:
    """Keep what was found out for a call with rules, unless something was copied for it.

    ``operands``: q, k and v as the caller gave them; ``rules``: the others by their names in
    ``attention``; ``mod_args``: the names of the mods' arrays in the order of the plan's.
    """
    import cupy

    taken = take_apart(rules)
    if taken is None or not plan.steps or launch_cache.is_overridden():
        return
    if not launch_cache.are_settled((*choices[0], *choices[1:])):
        return
    given, ndarray = (*operands, *taken.arrays), cupy.ndarray
    of_torch = tensors.connect([x for x in given if x.__class__ is not ndarray])
    if of_torch and (out_given or any(x.__class__ is ndarray for x in operands)):
        return
    if not of_torch and any(x.__class__ is not ndarray for x in given):
        return
    names = ["q", "k", "v", *pointers_of(taken, mod_args)]
    places = [address_of(x, ndarray) for x in given]
    if places != [plan.arrays[n].data.ptr if n in plan.arrays else None for n in names]:
        return  # copied, or not asked for
    made = [plan.arrays[n] for n in ("o", "lse")[out_given:] if n in plan.arrays]
    if any(x.data.ptr % MAX_ALIGN for x in made):
        return  # others would get a kernel that is built for less
    out = plan.arrays["o"] if out_given else None
    lse, device = "lse" in plan.arrays, cupy.cuda.runtime.getDevice()
    try:
        key = _key(given, taken, out, lse, device, choices, ndarray)
        hash(key)
    except TypeError:  # a list is legal, but keys nothing
        return
    if not once.comes_again(key):
        return
    if len(_known) >= _LIMIT:
        _known.clear()
    _known[key] = _KnownCall(plan, names)


def launch_again(
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    return_lse: bool,
    choices: tuple[Any, ...],
    rules: Mapping[str, Any],
) -> Any:
    """Launch a call that is remembered and return its result; None if it is not.

    ``choices``: as ``launch_cache.launch_again`` gets them; ``rules``: the other arguments that are
    given, by name.
    """
    if not _known or (taken := take_apart(rules)) is None:
        return None
    import cupy

    given, ndarray = (q, k, v, *taken.arrays), cupy.ndarray
    if q.__class__ is not ndarray:
        if out is not None:
            return None
        return _launch_tensors(given, taken, return_lse, choices, ndarray)
    device = cupy.cuda.runtime.getDevice()
    if not are_on(device, (*given, out), ndarray):
        return None
    known = _find(given, taken, out, return_lse, device, choices, ndarray)
    if known is None:
        return None
    stream = cupy.cuda.get_current_stream().ptr
    if stream > 1 and cupy.cuda.runtime.streamIsCapturing(stream):
        return None  # what it allocates is the graph's
    addresses = [x.data.ptr for x in given]
    if out is not None and known.overlaps(addresses, out.data.ptr):
        return None  # the long way looks closer, or says what is wrong
    made = {name: cupy.empty(*kind) for name, kind in known.results.items()}
    if out is not None:
        made["o"] = out
    scratch = cupy.empty(known.scratch_size, np.float32)
    allocated = [x.data.ptr for x in (*made.values(), scratch) if x is not out]
    if any(address % MAX_ALIGN for address in allocated):
        return None  # an allocator has given memory that is not as the kernels are built for
    out, lse = made["o"], made.get("lse")
    addresses += [x.data.ptr for x in made.values()]
    _launch(known, taken, addresses, scratch.data.ptr, device, stream)
    return out if lse is None else (out, lse)


def _launch_tensors(
    given: tuple[Any, ...],
    taken: TakenApart,
    return_lse: bool,
    choices: tuple[Any, ...],
    ndarray: Any,
) -> Any:
    """``launch_again`` for tensors; the results are, too."""
    place = tensors.place([x for x in given if x.__class__ is not ndarray])
    q = given[0]
    if place is None or tensors.is_cast(q.dtype):
        return None
    device, stream = place
    if not are_on(device, (x for x in taken.arrays if x.__class__ is ndarray), ndarray):
        return None
    known = _find(given, taken, None, return_lse, device, choices, ndarray)
    if known is None:
        return None
    if not known.patterns:
        shapes = {name: shape for name, (shape, _) in known.results.items()}
        shapes["scratch"] = (known.scratch_size,)
        known.patterns = [tensors.pattern(q, x, float32=n != "o") for n, x in shapes.items()]
    *results, scratch = made = tensors.like(known.patterns)
    if any(x.data_ptr() % MAX_ALIGN for x in made):
        return None
    addresses = [address_of(x, ndarray) for x in (*given, *results)]
    at = scratch.data_ptr()
    if known.workspace_bytes is None:
        _launch(known, taken, addresses, at, device, stream)
    else:  # a workspace is CuPy's, and its current stream's
        with entered(device, interop.stream_of(q)):
            _launch(known, taken, addresses, at, device, stream)
    return tuple(results) if return_lse else results[0]


def _launch(
    known: _KnownCall,
    taken: TakenApart,
    addresses: list[int],
    scratch: int,
    device: int,
    stream: int,
) -> None:
    addresses.append(integer_key(taken.rng))
    if known.workspace_bytes is not None:
        area = workspace(*known.workspace_bytes)
        addresses += [area.partials, area.counters]
    known.launch(addresses, scratch, device, stream)


def _find(*parts: Any) -> _KnownCall | None:
    try:
        known = _known.get(_key(*parts))
    except (TypeError, AttributeError):  # what is wrong, or cannot be hashed: for the long way
        return None
    return None if known is None or launch_cache.is_other_environment() else known


def _key(
    given: Sequence[Any],
    taken: TakenApart,
    out: Any,
    return_lse: bool,
    device: int,
    choices: tuple[Any, ...],
    ndarray: Any,
) -> tuple[Any, ...]:
    """All that launches depend on but the addresses themselves."""
    return (
        *[form_of(x, ndarray) for x in given], None if out is None else form_of(out, ndarray),
        taken.key, return_lse, device, choices, tuple(map(type, choices[0])),
    )  # fmt: skip
