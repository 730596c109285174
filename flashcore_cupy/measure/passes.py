"""What the jobs of this folder ask of either pass, attention or its gradients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

from flashcore_cupy.check.verify import Check
from flashcore_cupy.check.verify_backward import GradientsCheck
from flashcore_cupy.cpu.emulator.backward import EmulatedBackward
from flashcore_cupy.cpu.emulator.plan import EmulatedPlan
from flashcore_cupy.launch.backward import GpuBackward
from flashcore_cupy.launch.plan import GpuPlan
from flashcore_cupy.measure.timing import free_memory
from flashcore_cupy.problem.attention_problem import AttentionProblem
from flashcore_cupy.select.config import KernelConfig

OnGpu = GpuPlan | GpuBackward
OnCpu = EmulatedPlan | EmulatedBackward
Checked = Check | GradientsCheck
Overrides = Mapping[str, object] | None


class Choice(Protocol):
    """The kernels that a pass gets on a target."""

    @property
    def name(self) -> str:
        """As ``kernel=`` takes it."""

    @property
    def configs(self) -> tuple[KernelConfig, ...]:
        """Each that is launched, in launch order."""

    @property
    def passed_over(self) -> tuple[tuple[str, str], ...]:
        """Faster kernels, and why they cannot do it."""

    def describe(self) -> str:
        """One line for people about the tiles."""

    def explained(self, arch: str) -> list[str]:
        """Lines for people about what was chosen, and what was passed over."""


class Pass(ABC):
    """Attention on one problem, or its gradients."""

    problem: AttentionProblem
    ladder: ClassVar[Mapping[str, str]]
    """Its kernels, slowest first, and the idea of each."""

    @abstractmethod
    def choose(self, arch: str, kernel: str = "auto", overrides: Overrides = None) -> Choice:
        """The kernels for it. Raises ``ValueError`` with the reason if there are none."""

    @property
    @abstractmethod
    def gate(self) -> str | None:
        """The stage that it stops at."""

    @property
    @abstractmethod
    def flops(self) -> float:
        """Floating-point operations of its products."""

    @property
    @abstractmethod
    def memory_needed(self) -> int:
        """Bytes on the host, roughly: the arrays, and what checks them."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Return its sizes and rules under the command line's names."""

    @abstractmethod
    def trial(self, seed: int) -> Trial:
        """Draw its inputs."""

    def check_memory(self) -> None:
        """Raise ``ValueError`` if this machine has not the memory to make and check the inputs."""
        free = free_memory()
        if free is not None and self.memory_needed > free:
            raise ValueError(
                f"the inputs and their check take {self.memory_needed / 2**30:.3g} GiB of memory, "
                f"and {free / 2**30:.3g} GiB are free; use fewer or shorter sequences, or fewer "
                f"heads"
            )


class Trial(ABC):
    """A pass with its inputs, on the host. What is written is NaN before."""

    @abstractmethod
    def expect(self, choice: Choice | None = None) -> None:
        """Find what it should give, for all checks to come; ``choice``: what is checked first."""

    @property
    @abstractmethod
    def extent(self) -> Mapping[str, int]:
        """How much of the result is checked, by the names of a ``Ladder``'s fields."""

    @abstractmethod
    def on_gpu(self, kernel: str, overrides: Overrides = None) -> OnGpu:
        """Bind it to a kernel on the current GPU."""

    @abstractmethod
    def calls_on_gpu(self, kernel: str, overrides: Overrides = None) -> Callable[[], Any]:
        """What does it as a user does, on the arrays of ``on_gpu``."""

    @abstractmethod
    def emulated(self, arch: str, kernel: str, overrides: Overrides = None) -> OnCpu:
        """Bind it to a kernel on the CPU, built as for a target."""

    @abstractmethod
    def by_numpy(self) -> Callable[[], Any]:
        """What does it by NumPy, as a user does, and returns what a user gets."""

    @abstractmethod
    def check(self, bound: OnGpu | OnCpu) -> Checked:
        """Check what a launch has left."""

    @abstractmethod
    def check_call(self, made: Any) -> Checked:
        """Check what NumPy has returned."""
