"""A backward pass bound to its kernels and its arrays: what a GPU launches and a CPU emulates."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from flashcore_cupy.problem.gradients import BackwardProblem, Gradients, gathered
from flashcore_cupy.select.backward import BackwardSelection


@dataclass
class BackwardPlan(ABC):
    """One problem bound to its arrays: ``launch()`` runs it, as often as wanted."""

    problem: BackwardProblem
    selection: BackwardSelection
    arrays: dict[str, Any]
    """All that a launch touches, by the names in ``BackwardParams``; the mods' are "mod_args[0]",
    ..."""

    @abstractmethod
    def launch(self) -> None:
        """Run the kernels, or enqueue them."""

    @property
    def gradients(self) -> Gradients:
        """What launches write."""
        names = (result.name for result in self.problem.results)
        return gathered({name: self.arrays[name] for name in names})

    def gate_output(self) -> Any:
        """What the gate stopped at, float32 (B, Hq, Sq, Skv)."""
        return self.arrays["gate"]
