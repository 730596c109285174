"""The launch cache of the backward pass: a repeated call allocates, writes addresses, and launches.

As ``launch_cache``, for gradients of plain calls that go to new arrays, or tensors. All else, and
whatever is to be refused, takes the long way.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from flashcore_cupy.launch import launch_cache, tensor_map, tensors
from flashcore_cupy.launch.backward import GpuBackward
from flashcore_cupy.launch.parameter_block import ParameterBlock
from flashcore_cupy.launch.plan import Step
from flashcore_cupy.problem.attention_problem import MAX_ALIGN
from flashcore_cupy.problem.gradients import Gradients
from flashcore_cupy.select.backward import pointer_of
from flashcore_cupy.select.plan import Params
from flashcore_cupy.select.tensor_view import View
from flashcore_cupy.select.units import round_up

_LIMIT = 4096  # problems remembered; beyond, all are forgotten
_Q = 1  # the place of q among a call's operands
_known: dict[Any, KnownCall] = {}


class KnownCall:
    """All that a call's launches need besides its arrays' addresses."""

    def __init__(self, bound: GpuBackward, given: Iterable[str]) -> None:
        problem = bound.problem
        results = {result.name: bound.arrays[result.name] for result in problem.results}
        self.results = {name: (x.shape, x.dtype) for name, x in results.items()}
        scratch = bound.selection.scratch(problem.attention)
        # One allocation for all, in floats: where each begins in it, and the end of the last.
        sizes = [round_up(math.prod(shape), MAX_ALIGN) for shape in scratch.values()]
        *self.scratch, self.scratch_size = itertools.accumulate(sizes, initial=0)
        # In the order of the addresses of each call.
        names = [*map(pointer_of, given), *results, *scratch]
        addresses = [bound.arrays[name].data.ptr for name in names]
        views = (bound.selection.views(launch.config, problem) for launch in bound.launches)
        self.launches = [
            _KnownLaunch(step, launch.params, names, shown, addresses)
            for step, launch, shown in zip(bound.steps, bound.launches, views, strict=True)
        ]
        self.shared = _shared(self.launches)
        # A call takes a list and puts it back, so that threads never share one.
        self.blocks: list[_BoundBlocks] = []
        #: New results and scratch of torch's are like these; they are made when first asked for.
        self.patterns: list[Any] = []

    def launch(self, addresses: list[int], scratch: int, device: int, stream: int) -> None:
        """Hand the launches to the driver; ``addresses``: of what is given, and of the results."""
        import cupy

        addresses += [scratch + 4 * first for first in self.scratch]
        bound = self.blocks.pop() if self.blocks else _BoundBlocks(self)
        if bound.addresses != addresses:
            for n in bound.own:
                self.launches[n].move(bound.each[n], addresses)
            bound.addresses = addresses
        launch_kernel = cupy.cuda.driver.launchKernel
        cupy.cuda.runtime.setDevice(device)  # as enter_context() does, for a new thread
        for geometry, address in bound.steps:
            launch_kernel(*geometry, stream, address, 0)
        self.blocks.append(bound)


class _BoundBlocks:
    """Parameter blocks of a call's launches, and the addresses that they hold."""

    __slots__ = ("addresses", "each", "own", "steps")

    def __init__(self, known: KnownCall) -> None:
        self.addresses: list[int] = []
        self.own = sorted(set(known.shared))
        made = {n: known.launches[n].params.copy() for n in self.own}
        self.each = [made[n] for n in known.shared]
        pairs = zip(known.launches, self.each, strict=True)
        self.steps = [(launch.geometry, block.address) for launch, block in pairs]


def _shared(launches: list[_KnownLaunch]) -> list[int]:
    """Whose parameters each launch takes: the longest that begin with its own.

    A kernel reads as much of them as it knows, and most know the same.
    """
    contents = [launch.params.words.tobytes() for launch in launches]
    longest_first = sorted(range(len(launches)), key=lambda n: -len(contents[n]))
    return [
        next(
            n
            for n in longest_first
            if contents[n].startswith(own) and launches[n].places == launch.places
        )
        for launch, own in zip(launches, contents, strict=True)
    ]


class _KnownLaunch:
    """One launch, and where its parameters hold which array's address."""

    def __init__(
        self,
        step: Step,
        params: Params,
        names: list[str],
        views: Iterable[View],
        addresses: list[int],
    ) -> None:
        self.geometry = (step.function, step.grid, 1, 1, step.block, 1, 1, step.smem_bytes)
        self.params = step.params
        fields: Mapping[str, Any] = params.dtype.fields or {}
        self.places = [fields[name][1] // 8 for name in names]
        self.q = names.index("q")
        self.maps = [(v, names.index(v.name), fields[f"{v.name}_map"][1]) for v in views]
        self.movable = all(
            tensor_map.movable(addresses[n] or addresses[self.q], view) for view, n, _ in self.maps
        )

    def move(self, block: ParameterBlock, addresses: list[int]) -> None:
        """Have the parameters hold other addresses."""
        words = block.words
        for place, address in zip(self.places, addresses, strict=True):
            words[place] = address
        for view, n, offset in self.maps:
            # An array without elements may have no address; its map is never used.
            address = addresses[n] or addresses[self.q]
            if self.movable:
                words[offset // 8] = address + view.offset
            else:
                encoded = tensor_map.encode(address, view).view("u1")
                block.bytes[offset : offset + encoded.size] = encoded


def remember(bound: GpuBackward, operands: Mapping[str, Any], choices: tuple[Any, ...]) -> None:
    """Keep what was found out for a call without rule arrays, whose results are new arrays.

    ``operands``: as the caller gave them, q, k, v, do, o, lse and dlse; ``choices``: what else
    there is, as ``launch_again`` gets it.
    """
    import cupy

    given = {name: x for name, x in operands.items() if x is not None}
    of_torch = tensors.connect(given.values())
    if not of_torch and any(x.__class__ is not cupy.ndarray for x in given.values()):
        return
    addresses = [x.data_ptr() if of_torch else x.data.ptr for x in given.values()]
    if addresses != [bound.arrays[pointer_of(name)].data.ptr for name in given]:
        return  # copied
    settled = launch_cache.are_settled((*choices[0], *choices[1], *choices[2:]))
    if not settled or launch_cache.is_overridden() or _misaligned(bound.gradients):
        return
    key_of = _tensor_key if of_torch else _key
    key = key_of(tuple(operands.values()), cupy.cuda.runtime.getDevice(), choices)
    try:
        hash(key)
    except TypeError:  # a list is legal, but keys nothing
        return
    if len(_known) >= _LIMIT:
        _known.clear()
    _known[key] = KnownCall(bound, given)


def launch_again(operands: Mapping[str, Any], choices: tuple[Any, ...]) -> Gradients | None:
    """Launch a call that is remembered and return its gradients; None if it is not.

    ``choices``: wrt, the window, then others and their classes, for True and 1 are equal, but not
    the same argument.
    """
    if not _known:
        return None
    import cupy

    given = tuple(operands.values())
    if given[0].__class__ is not cupy.ndarray:
        return _launch_tensors(given, choices)
    ndarray, device = cupy.ndarray, cupy.cuda.runtime.getDevice()
    for x in given:
        if x is not None and (x.__class__ is not ndarray or x.data.device_id != device):
            return None
    try:
        known = _known.get(_key(given, device, choices))
    except (TypeError, AttributeError):  # what is wrong, or cannot be hashed: for the long way
        return None
    if known is None or launch_cache.is_other_environment():
        return None
    stream = cupy.cuda.get_current_stream().ptr
    if stream > 1 and cupy.cuda.runtime.streamIsCapturing(stream):
        return None  # what it allocates is the graph's
    empty = cupy.empty
    results = [empty(*kind) for kind in known.results.values()]
    if _misaligned(results):
        return None
    scratch = empty(known.scratch_size, np.float32)
    addresses = [x.data.ptr for x in (*given, *results) if x is not None]
    known.launch(addresses, scratch.data.ptr, device, stream)
    return Gradients(**dict(zip(known.results, results, strict=True)))


def _launch_tensors(given: tuple[Any, ...], choices: tuple[Any, ...]) -> Gradients | None:
    """``launch_again`` for tensors; the gradients are, too."""
    place = tensors.place(given)
    if place is None:
        return None
    known = find_tensors(given, place[0], choices)
    if known is None or launch_cache.is_other_environment():
        return None
    addresses = [x.data_ptr() for x in given if x is not None]
    results = launch_on_tensors(known, addresses, given[_Q], *place)
    return None if results is None else Gradients(**dict(zip(known.results, results, strict=True)))


def find_tensors(given: tuple[Any, ...], device: int, choices: tuple[Any, ...]) -> KnownCall | None:
    """A call on tensors that have a place, if it is remembered."""
    try:
        return _known.get(_tensor_key(given, device, choices))
    except TypeError:  # what is wrong, or cannot be hashed: for the long way
        return None


def launch_on_tensors(
    known: KnownCall, addresses: list[int], q: Any, device: int, stream: int
) -> list[Any] | None:
    """Launch a call on tensors, by their addresses; returns gradients.

    None where an allocator has given memory that is not as the kernels are built for.
    """
    if not known.patterns:  # of the dtype of q, k and v, which is one
        shapes = [shape for shape, _ in known.results.values()]
        scratch = tensors.pattern(q, (known.scratch_size,), float32=True)
        known.patterns = [*(tensors.pattern(q, shape) for shape in shapes), scratch]
    made = tensors.like(known.patterns)
    placed = [x.data_ptr() for x in made]
    union = 0
    for address in placed:
        union |= address
    if union % MAX_ALIGN:
        return None
    made.pop()
    at = placed.pop()
    known.launch(addresses + placed, at, device, stream)
    return made


def _misaligned(results: Iterable[Any]) -> bool:
    """Whether an allocator has given memory that is not as the kernels are built for."""
    return any(x is not None and x.data.ptr % MAX_ALIGN for x in results)


def _key(given: tuple[Any, ...], device: int, choices: tuple[Any, ...]) -> tuple[Any, ...]:
    """All that launches depend on but the addresses themselves."""
    return (
        # Each by itself: kernels differ in what they load.
        *[
            x if x is None else (
                x.shape, x._c_contiguous or x.strides, x.dtype, x.data.ptr % MAX_ALIGN
            )
            for x in given
        ],
        device, choices, tuple(map(type, choices[1])),
    )  # fmt: skip


def _tensor_key(given: tuple[Any, ...], device: int, choices: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same of tensors."""
    return (
        *[x if x is None else (*tensors.form(x), x.data_ptr() % MAX_ALIGN) for x in given],
        device, choices, tuple(map(type, choices[1])),
    )  # fmt: skip
