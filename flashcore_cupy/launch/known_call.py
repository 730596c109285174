"""A call that was launched once, as it is launched again: with other addresses, and all else as is.

To find which words of the parameters hold which address, they are written twice, for made-up
addresses. So no list of fields has to follow what kernels take.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from flashcore_cupy.launch import tensor_map
from flashcore_cupy.launch.parameter_block import ParameterBlock
from flashcore_cupy.launch.plan import Step
from flashcore_cupy.problem.attention_problem import MAX_ALIGN
from flashcore_cupy.select.config import KernelConfig
from flashcore_cupy.select.plan import Params
from flashcore_cupy.select.tensor_view import View
from flashcore_cupy.select.units import round_up

Written = Callable[[Mapping[str, int]], Sequence[Params]]
"""What all launches get, but for tensor maps, if the arrays of these names lie there."""

_FIRST, _APART, _MOVED = 2**44, 2**36, 2**20  # addresses that are nobody's, and how far they move


class KnownCall:
    """All that a call's launches need besides its addresses."""

    def __init__(
        self,
        steps: Sequence[Step],
        maps: Sequence[Sequence[Map]],
        written: Written,
        addresses: Mapping[str, int],
        scratch: Mapping[str, int],
        results: Mapping[str, tuple[tuple[int, ...], Any]],
    ) -> None:
        """``steps``: as they were launched, and ``maps``: those in the parameters of each.

        ``addresses``: of this first call, by name, in the order in which each call brings its own.
        ``scratch``: bytes of what launches leave for each other; ``results``: shapes and dtypes.
        """
        self.results = results
        # One allocation for all scratch, in floats: where each begins, and the end of the last.
        sizes = [round_up(-(-size // 4), MAX_ALIGN) for size in scratch.values()]
        *self.scratch, self.scratch_size = itertools.accumulate(sizes, initial=0)
        names = [*addresses, *scratch]
        places = _places(written, names)
        self.launches = [
            _KnownLaunch(step, own, others, names, addresses)
            for step, own, others in zip(steps, places, maps, strict=True)
        ]
        self.shared = _shared(self.launches)
        # A call takes a list and puts it back, so that threads never share one.
        self.blocks: list[_BoundBlocks] = []
        #: New results and scratch of torch's are like these; they are made when first asked for.
        self.patterns: list[Any] = []

    def launch(self, addresses: list[int], scratch: int, device: int, stream: int) -> None:
        """Hand the launches to the driver; ``addresses`` in the order of the first call's."""
        import cupy

        addresses += [scratch + 4 * first for first in self.scratch]
        bound = self.blocks.pop() if self.blocks else _BoundBlocks(self)
        if bound.addresses != addresses:
            for n in bound.own:
                self.launches[n].move(bound.each[n], addresses)
            bound.addresses = addresses
        launch_kernel = cupy.cuda.driver.launchKernel
        cupy.cuda.runtime.setDevice(device)  # as enter_context() does, for a new thread
        for geometry, overlapping, address in bound.steps:
            if overlapping is None:
                launch_kernel(*geometry, stream, address, 0)
            else:
                overlapping(stream, address)
        self.blocks.append(bound)


class Map(NamedTuple):
    """A tensor map in a launch's parameters."""

    view: View
    word: int
    """Where it begins, in words of 8 bytes."""


def maps_in(config: KernelConfig, views: Iterable[View]) -> list[Map]:
    """Where a kernel's parameters have the maps of these views."""
    fields: Mapping[str, Any] = config.params.fields or {}
    return [Map(view, fields[f"{view.name}_map"][1] // 8) for view in views]


class _Place(NamedTuple):
    """Where parameters hold an address."""

    word: int
    """Of 8 bytes."""
    which: int
    """Of the addresses."""
    offset: int
    """What is added to it."""


def _places(written: Written, names: Sequence[str]) -> list[list[_Place]]:
    """Where each launch's parameters hold which of these addresses."""
    tried = {name: _FIRST + _APART * n for n, name in enumerate(names)}
    moved = {name: x + _MOVED * n for n, (name, x) in enumerate(tried.items(), start=1)}
    both = zip(written(tried), written(moved), strict=True)
    return [list(_differences(_words(x), _words(y), len(names))) for x, y in both]


def _words(params: Params) -> Any:
    return ParameterBlock(params).words


def _differences(tried: Any, moved: Any, count: int) -> Iterable[_Place]:
    for word, (here, there) in enumerate(zip(tried, moved, strict=True)):
        if here != there:
            nth, rest = divmod(there - here, _MOVED)
            assert rest == 0 and 1 <= nth <= count, "an address, or one and a number"
            yield _Place(word, nth - 1, here - (_FIRST + _APART * (nth - 1)))


class _BoundBlocks:
    """Parameter blocks of a call's launches, and the addresses that they hold."""

    __slots__ = ("addresses", "each", "own", "steps")

    def __init__(self, known: KnownCall) -> None:
        self.addresses: list[int] = []
        self.own = sorted(set(known.shared))
        made = {n: known.launches[n].params.copy() for n in self.own}
        self.each = [made[n] for n in known.shared]
        pairs = zip(known.launches, self.each, strict=True)
        self.steps = [(x.geometry, x.overlapping, block.address) for x, block in pairs]


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
        places: list[_Place],
        maps: Sequence[Map],
        names: list[str],
        addresses: Mapping[str, int],
    ) -> None:
        self.geometry = (step.function, step.grid, 1, 1, step.block, 1, 1, step.smem_bytes)
        self.overlapping = step.overlapping
        self.params = step.params
        self.places = places
        self.q = names.index("q")
        self.maps = [(names.index(x.view.name), x) for x in maps]
        self.movable = all(
            tensor_map.movable(addresses[x.view.name] or addresses["q"], x.view) for x in maps
        )

    def move(self, block: ParameterBlock, addresses: list[int]) -> None:
        """Have the parameters hold other addresses."""
        words = block.words
        for word, which, offset in self.places:
            words[word] = addresses[which] + offset
        for which, (view, word) in self.maps:
            # An array without elements may have no address; its map is never used.
            address = addresses[which] or addresses[self.q]
            if self.movable:
                words[word] = address + view.offset
            else:
                encoded = tensor_map.encode(address, view)
                block.bytes[word * 8 : word * 8 + encoded.nbytes] = encoded.view("u1")
