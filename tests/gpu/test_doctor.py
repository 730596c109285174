"""What the doctor says where there is a GPU."""

from __future__ import annotations

import pytest
from helpers import finding

from flashcore_cupy.jit import compiler

pytestmark = pytest.mark.usefixtures("own_settings")


def test_gpu_is_described_and_works() -> None:
    assert "compute" in finding("GPU").value and finding("GPU").state == "ok"
    assert finding("target").value == compiler.device_arch()
    assert finding("a CuPy call").value == "works"
