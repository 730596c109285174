"""What kernels are built for: the targets, and the shared memory that they have.

Names are the compiler's: ``"sm_90a"`` is compute capability 9.0 with its own instructions.
"""

from __future__ import annotations

from flashcore_cupy.settings import arch_override

_KIB = 1024
#: Shared memory that one thread block may have, bytes (CUDA C++ Programming Guide, "Compute
#: Capabilities", table of technical specifications).
_SMEM_LIMIT = {
    75: 64 * _KIB,
    80: 163 * _KIB,
    86: 99 * _KIB,
    87: 163 * _KIB,
    88: 163 * _KIB,
    89: 99 * _KIB,
    90: 227 * _KIB,
    100: 227 * _KIB,
    103: 227 * _KIB,
    110: 227 * _KIB,
    120: 99 * _KIB,
    121: 99 * _KIB,
}

#: The one target that has wgmma.
HOPPER = "sm_90a"
#: The target where there is no GPU to ask, and nobody names one.
DEFAULT_ARCH = HOPPER
#: Targets that every row is built for by the tests and by ``warmup --all``. A GPU of one of these
#: compute capabilities gets it; others get the plain target.
TARGETS = ("sm_75", "sm_80", "sm_89", HOPPER, "sm_100", "sm_120")


def target_of(compute_capability: int) -> str:
    """What a GPU gets: 90 gives "sm_90a"."""
    own = (arch for arch in TARGETS if capability(arch) == compute_capability)
    return next(own, f"sm_{compute_capability}")


def target_without_gpu(arch: str | None = None) -> str:
    """The target where there is no GPU to ask: ``arch``, what FLASHCORE_ARCH says, or Hopper."""
    return arch or arch_override() or DEFAULT_ARCH


def capability(arch: str) -> int:
    """90 for "sm_90a"."""
    digits = "".join(c for c in arch.partition("_")[2] if c.isdigit())
    if not digits:
        raise ValueError(f"arch: got {arch!r}; use a target such as 'sm_90a'")
    return int(digits)


def smem_limit(arch: str) -> int:
    """Bytes of shared memory that a thread block may have on ``arch``; 48 KiB where unknown."""
    return _SMEM_LIMIT.get(capability(arch), 48 * _KIB)
