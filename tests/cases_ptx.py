"""What the instructions of tiles in float32 read."""

from __future__ import annotations

import numpy as np


def lane_offsets_f32(ld: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where each lane reads Q, K and V, in bytes from a tile's start, rows ``ld`` floats apart."""
    lane = np.arange(32)
    q = lane % 16 * ld + lane // 16 * 4
    k = lane % 8 * ld + lane // 8 * 4
    v = lane % 4 * 2 * ld + lane // 4
    return 4 * q, 4 * k, 4 * v
