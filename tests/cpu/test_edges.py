"""The edges of ``attention`` on NumPy arrays."""

from __future__ import annotations

import numpy as np
from cases_edges import *  # noqa: F403
from cases_edges import arrays, check, off_by_a_byte

import flashcore_cupy


def test_elements_off_their_multiples_are_copied() -> None:
    """Views of bytes: contiguous by their strides, yet no vector of elements."""
    host = arrays(30, 40)
    check(flashcore_cupy.attention(*(off_by_a_byte(x, np) for x in host)), *host)
