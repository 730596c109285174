"""What the hardware fixes, and the arithmetic on it that several families of kernels share."""

from __future__ import annotations

WARP_SIZE = 32
WARPGROUP_WARPS = 4
"""Warps that execute wgmma together."""
MMA = 16
"""Tensor cores multiply fragments of 16 x 16; tiles are cut into those."""
MAX_GRID = 2**31 - 1
"""Thread blocks of a launch."""


def round_up(n: int, multiple: int) -> int:
    """The next multiple of ``multiple``, or ``n`` itself."""
    return -(-n // multiple) * multiple


def panel_cols(columns: int) -> int:
    """Columns that lie side by side in a tile, and in a box; see ``shared_layout.cuh``."""
    return 64 if columns % 64 == 0 else 32
