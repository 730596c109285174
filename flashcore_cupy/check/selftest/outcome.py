"""How a case of the correctness matrix is run, and how it went."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flashcore_cupy.check.selftest.case import Case
from flashcore_cupy.cpu.emulator.run import KernelError
from flashcore_cupy.jit import nvrtc


@dataclass(frozen=True)
class CaseResult:
    """How a case went. Errors are absolute; None where it did not get that far."""

    case: Case
    ok: bool
    max_error: float | None
    allowed_error: float | None
    reason: str
    """Why it is not ok; empty if it is."""

    def to_json(self) -> dict[str, Any]:
        """Return a row of the report."""
        return {
            "kernel": self.case.kernel,
            "dtype": self.case.dtype,
            "head_dim": self.case.head_dim,
            "case": self.case.name,
            "ok": self.ok,
            "max_error": self.max_error,
            "allowed_error": self.allowed_error,
            "reason": self.reason,
        }


@dataclass(frozen=True)
class Emulated:
    """How a case runs on the CPU; each launch has another schedule."""

    arch: str
    seed: int = 0
    checking: bool = False


def failures(emulated: Emulated | None) -> tuple[type[Exception], ...]:
    """What a case raises that fails."""
    if emulated is not None:
        return ValueError, nvrtc.CompileError, KernelError
    import cupy

    of_cuda = (cupy.cuda.runtime.CUDARuntimeError, cupy.cuda.driver.CUDADriverError)
    return ValueError, nvrtc.CompileError, *of_cuda
