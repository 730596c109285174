"""Which kernel and which tile: the table, and what each family of kernels can do."""

from flashcore_cupy.select.registry import KERNELS, Kernel
from flashcore_cupy.select.selector import Selection, select

__all__ = ["KERNELS", "Kernel", "Selection", "select"]
