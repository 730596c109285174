"""The launch cache of the backward pass: a repeated call allocates, writes addresses, and launches.

As ``launch_cache`` and ``ruled_cache``, for gradients that go to new arrays, or tensors. All else,
and whatever is to be refused, takes the long way.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from flashcore_cupy.launch import launch_cache, once, tensors
from flashcore_cupy.launch.backward import GpuBackward
from flashcore_cupy.launch.known_call import KnownCall, maps_in
from flashcore_cupy.launch.taken_apart import (
    NO_RULES,
    NOTHING,
    TakenApart,
    address_of,
    are_on,
    form_of,
    pointers_of,
    take_apart,
)
from flashcore_cupy.problem.attention_problem import MAX_ALIGN
from flashcore_cupy.problem.gradients import Gradients, gathered
from flashcore_cupy.problem.rng import integer_key
from flashcore_cupy.select.backward import pointer_of
from flashcore_cupy.select.plan import Params
from flashcore_cupy.select.tensor_view import View

_LIMIT = 4096  # problems remembered; beyond, all are forgotten
_Q = 1  # the place of q among a call's operands
_FLOAT32 = np.dtype(np.float32)
_known: dict[Any, KnownCall] = {}


def remember(
    bound: GpuBackward,
    operands: Mapping[str, Any],
    choices: tuple[Any, ...],
    rules: Mapping[str, Any] = NO_RULES,
    mod_args: Sequence[str] = (),
) -> None:
    """Keep what was found out for a call whose results are new arrays.

    ``operands``: as the caller gave them, do, q, k, v, o, lse and dlse; ``choices`` and ``rules``:
    what else there is, as ``launch_again`` gets it; ``mod_args``: the names of the mods' arrays in
    the order of the call's.
    """
    import cupy

    taken = take_apart(rules)
    if taken is None:
        return
    named = {name: x for name, x in operands.items() if x is not None}
    given, ndarray = [*named.values(), *taken.arrays], cupy.ndarray
    of_torch = tensors.connect(given)
    if not of_torch and any(x.__class__ is not ndarray for x in given):
        return
    names = [*map(pointer_of, named), *pointers_of(taken, mod_args)]
    places = [address_of(x, ndarray) for x in given]
    if places != [bound.arrays[n].data.ptr if n in bound.arrays else None for n in names]:
        return  # copied, or not asked for
    settled = launch_cache.are_settled((*choices[0], *choices[1], *choices[2:]))
    if not settled or launch_cache.is_overridden():
        return
    results = [bound.arrays[result.name] for result in bound.problem.results]
    if _misaligned(results) or (of_torch and not _are_like(bound.arrays["q"].dtype, results)):
        return
    device = cupy.cuda.runtime.getDevice()
    try:
        key = _key(tuple(operands.values()), taken, device, choices, ndarray)
        hash(key)
    except TypeError:  # a list is legal, but keys nothing
        return
    if taken is not NOTHING and not once.comes_again(key):
        return
    if len(_known) >= _LIMIT:
        _known.clear()
    _known[key] = _known_call(bound, names)


def _known_call(bound: GpuBackward, inputs: Sequence[str]) -> KnownCall:
    """Its addresses are those of the inputs and of the results, and the key of dropout."""
    problem = bound.problem
    results = {result.name: bound.arrays[result.name] for result in problem.results}
    scratch = bound.selection.scratch(problem.attention)

    def written(at: Mapping[str, int]) -> list[Params]:
        return [launch.params for launch in bound.launches_at(at, _no_map)]

    return KnownCall(
        bound.steps,
        [maps_in(x.config, bound.selection.views(x.config, problem)) for x in bound.launches],
        written,
        {name: bound.arrays[name].data.ptr for name in (*inputs, *results)} | {"rng_key": 0},
        {name: 4 * math.prod(shape) for name, shape in scratch.items()},
        {name: (x.shape, x.dtype) for name, x in results.items()},
    )


def _no_map(address: int, view: View) -> Params:
    """A tensor map is moved by itself."""
    return np.zeros(16, np.uint64)


def launch_again(
    operands: Mapping[str, Any],
    choices: tuple[Any, ...],
    rules: Mapping[str, Any] = NO_RULES,
) -> Gradients | None:
    """Launch a call that is remembered and return its gradients; None if it is not.

    ``choices``: wrt, the window, then others and their classes, for True and 1 are equal, but not
    the same argument. ``rules``: the other arguments that are given, by name.
    """
    if not _known or (taken := take_apart(rules)) is None:
        return None
    import cupy

    operand = tuple(operands.values())
    if operand[0].__class__ is not cupy.ndarray:
        return _launch_tensors(operand, taken, choices)
    given = [x for x in (*operand, *taken.arrays) if x is not None]
    device = cupy.cuda.runtime.getDevice()
    if not are_on(device, given, cupy.ndarray):
        return None
    try:
        known = _known.get(_key(operand, taken, device, choices, cupy.ndarray))
    except (TypeError, AttributeError):  # what is wrong, or cannot be hashed: for the long way
        return None
    if known is None or launch_cache.is_other_environment():
        return None
    stream = cupy.cuda.get_current_stream().ptr
    if stream > 1 and cupy.cuda.runtime.streamIsCapturing(stream):
        return None  # what it allocates is the graph's
    empty = cupy.empty
    results = [empty(*kind) for kind in known.results.values()]
    scratch = empty(known.scratch_size, np.float32)
    if _misaligned((*results, scratch)):
        return None
    addresses = [x.data.ptr for x in (*given, *results)]
    known.launch([*addresses, integer_key(taken.rng)], scratch.data.ptr, device, stream)
    return gathered(dict(zip(known.results, results, strict=True)))


def _launch_tensors(
    operand: tuple[Any, ...], taken: TakenApart, choices: tuple[Any, ...]
) -> Gradients | None:
    """``launch_again`` for tensors; the gradients are, too."""
    place = tensors.place((*operand, *taken.arrays))
    if place is None:
        return None
    known = find_tensors(operand, place[0], choices, taken)
    if known is None or launch_cache.is_other_environment():
        return None
    addresses = [x.data_ptr() for x in (*operand, *taken.arrays) if x is not None]
    results = launch_on_tensors(known, addresses, operand[_Q], *place, rng=taken.rng)
    return None if results is None else gathered(dict(zip(known.results, results, strict=True)))


def find_tensors(
    operand: tuple[Any, ...],
    device: int,
    choices: tuple[Any, ...],
    taken: TakenApart = NOTHING,
) -> KnownCall | None:
    """A call on tensors that have a place, if it is remembered."""
    try:
        return _known.get(_key(operand, taken, device, choices, None))
    except TypeError:  # what is wrong, or cannot be hashed: for the long way
        return None


def launch_on_tensors(
    known: KnownCall,
    addresses: list[int],
    q: Any,
    device: int,
    stream: int,
    *,
    rng: tuple[int, int] | None = None,
) -> list[Any] | None:
    """Launch a call on tensors, by their addresses; returns gradients.

    None where an allocator has given memory that is not as the kernels are built for.
    """
    if not known.patterns:
        kinds = [*known.results.values(), ((known.scratch_size,), _FLOAT32)]
        known.patterns = [
            tensors.pattern(q, shape, float32=dtype == _FLOAT32) for shape, dtype in kinds
        ]
    made = tensors.like(known.patterns)
    placed = [x.data_ptr() for x in made]
    union = 0
    for address in placed:
        union |= address
    if union % MAX_ALIGN:
        return None
    made.pop()
    at = placed.pop()
    known.launch([*addresses, *placed, integer_key(rng)], at, device, stream)
    return made


def _are_like(dtype: Any, results: Iterable[Any]) -> bool:
    """Whether tensors for these results are made like q, or are of float32."""
    return all(x.dtype in (dtype, _FLOAT32) for x in results)


def _misaligned(results: Iterable[Any]) -> bool:
    """Whether an allocator has given memory that is not as the kernels are built for."""
    return any(x.data.ptr % MAX_ALIGN for x in results)


def _key(
    operand: tuple[Any, ...],
    taken: TakenApart,
    device: int,
    choices: tuple[Any, ...],
    ndarray: Any,
) -> tuple[Any, ...]:
    """All that launches depend on but the addresses themselves."""
    return (
        # Each by itself: kernels differ in what they load.
        *[x if x is None else form_of(x, ndarray) for x in (*operand, *taken.arrays)],
        taken.key, device, choices, tuple(map(type, choices[1])),
    )  # fmt: skip
