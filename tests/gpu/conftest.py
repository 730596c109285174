"""Where a test that is the same anywhere runs in this folder."""

from __future__ import annotations

import pytest


@pytest.fixture
def on() -> str:
    """On every kernel on this GPU."""
    return "gpu"
