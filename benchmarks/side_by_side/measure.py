"""One row: bind every backend to a cell, check ours, let all take turns."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from side_by_side import gate, gradient_gate
from side_by_side.backends import Backend, Inputs, Run, first_result, random_inputs
from side_by_side.cells import Cell
from side_by_side.joules import Joules
from side_by_side.results import OURS, Entry, Row
from side_by_side.timing import Gpu, Timer, reason_of, take_turns

_COLD = "CUDA events around one call, replayed as a CUDA graph, L2 flushed before it"
#: How each group is timed; stands in the results.
METHODS = {
    "grid": _COLD,
    "small": "per call in a replayed CUDA graph of 32 calls, inputs warm in L2",
    "decode": "per call in a replayed CUDA graph; inputs rotate over at least 3x the L2",
    "variants": _COLD,
    "varlen": _COLD,
    "blocks": f"{_COLD}; block masks are there",
    "backward": f"{_COLD}; o and its log-sum-exp are there",
    "percall": "wall time of 200 calls from Python and their wait; GPU time from a replayed graph",
}

_SMALL_CALLS = 32
_DECODE_CALLS = 8
_PYTHON_CALLS = 200


@dataclass
class Bench:
    """A GPU, the backends to compare, how many rounds each cell gets, and what measures energy."""

    gpu: Gpu
    backends: Sequence[Backend]
    rounds: int
    joules: Joules | None = None
    backward: Sequence[Backend] = ()
    """Of the cells that ask for gradients."""

    def row(self, cell: Cell) -> Row:
        """Measure one cell. A backend that fails has its reason in place of a figure."""
        timed = {
            "grid": self._cold,
            "small": self._small,
            "decode": self._decode,
            "variants": self._cold,
            "varlen": self._cold,
            "blocks": self._cold,
            "backward": self._cold,
            "percall": self._percall,
        }
        return timed[cell.group](cell)

    def _cold(self, cell: Cell) -> Row:
        replays: dict[str, Callable[[], Any]] = {}
        kept = []  # a graph does not keep what it reads and writes

        def timer(backend: Backend, runs: Sequence[Run], _: Inputs) -> Timer:
            kept.append(runs)
            # As a graph: what a call does in Python may take longer than the flush.
            replays[backend.name] = backend.capture(runs)
            return self.gpu.cold(replays[backend.name])

        row = self._measured(cell, 1, timer)
        return row if self.joules is None else self._loaded(row, replays, self.joules)

    def _loaded(self, row: Row, replays: Mapping[str, Callable[[], Any]], joules: Joules) -> Row:
        us = {name: us for name in replays if (us := row.us(name)) is not None}
        loads = joules.loads({name: replays[name] for name in us}, us, row.cell.flops)
        entries = {name: replace(x, load=loads.get(name)) for name, x in row.entries.items()}
        return replace(row, entries=entries)

    def _small(self, cell: Cell) -> Row:
        return self._measured(cell, 1, self._graph_timer(_SMALL_CALLS))

    def _decode(self, cell: Cell) -> Row:
        copies = math.ceil(3 * self.gpu.l2_bytes / cell.kv_bytes)
        calls = copies * math.ceil(_DECODE_CALLS / copies)
        return self._measured(cell, copies, self._graph_timer(calls))

    def _graph_timer(self, calls: int) -> Callable[[Backend, Sequence[Run], Inputs], Timer]:
        def timer(backend: Backend, runs: Sequence[Run], _: Inputs) -> Timer:
            replay = backend.capture([runs[i % len(runs)] for i in range(calls)])
            return self.gpu.replayed(replay, calls)

        return timer

    def _percall(self, cell: Cell) -> Row:
        on_gpu = self._measured(cell, 1, self._graph_timer(_SMALL_CALLS))
        seen = self._measured(cell, 1, self._python_timer(cell))
        entries = {
            name: replace(entry, gpu_us=on_gpu.us(name)) for name, entry in seen.entries.items()
        }
        return replace(seen, entries=entries)

    def _python_timer(self, cell: Cell) -> Callable[[Backend, Sequence[Run], Inputs], Timer]:
        def timer(backend: Backend, _: Sequence[Run], inputs: Inputs) -> Timer:
            call = backend.public_call(cell, inputs)
            return self.gpu.from_python(call, _PYTHON_CALLS, backend.selected)

        return timer

    def _measured(
        self,
        cell: Cell,
        copies: int,
        timer_of: Callable[[Backend, Sequence[Run], Inputs], Timer],
    ) -> Row:
        """Bind to ``copies`` of the inputs, check ours, make a timer of each, take turns."""
        sets = [random_inputs(self.gpu.torch, cell, seed) for seed in range(copies)]
        every = self.backward if cell.is_backward else self.backends
        backends = [backend for backend in every if backend.takes(cell)]
        entries: dict[str, Entry] = {}
        runs: dict[str, list[Run]] = {}
        results: dict[str, Any] = {}
        for backend in backends:
            try:
                runs[backend.name] = [backend.bind(cell, inputs) for inputs in sets]
                results[backend.name] = first_result(runs[backend.name][0], backend.selected)
                self.gpu.synchronize()
            except Exception as error:
                entries[backend.name] = Entry(reason=reason_of(error))
        checked = self._check(cell, sets[0], results, entries)
        results.clear()
        timers: dict[str, Timer] = {}
        for backend in backends:
            if backend.name in entries:
                continue
            try:
                for run in runs[backend.name][1:]:
                    first_result(run, backend.selected)
                timers[backend.name] = timer_of(backend, runs[backend.name], sets[0])
            except Exception as error:
                entries[backend.name] = Entry(reason=reason_of(error))
        entries |= take_turns(timers, self.rounds)
        return Row(cell, _in_order(backends, entries), checked)

    def _check(
        self, cell: Cell, inputs: Inputs, results: dict[str, Any], entries: dict[str, Entry]
    ) -> str:
        """Judge ours, and the others beside it; who is wrong loses its turn."""
        if OURS not in results:
            return ""
        peers = {name: result for name, result in results.items() if name != OURS}
        try:
            check = gradient_gate.check if cell.is_backward else gate.check
            judged = check(self.gpu.torch, cell, inputs, results[OURS], peers)
        except Exception as error:
            entries[OURS] = Entry(reason=reason_of(error))
            return entries[OURS].reason or ""
        entries |= {name: Entry(reason=reason) for name, reason in judged.wrong.items()}
        return judged.text


def _in_order(backends: Sequence[Backend], entries: Mapping[str, Entry]) -> dict[str, Entry]:
    notes = {backend.name: backend.note() for backend in backends}
    return {
        name: entry if entry.us is None else replace(entry, note=note)
        for name, note in notes.items()
        for entry in (entries[name],)
    }
