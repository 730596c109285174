"""Tensors of torch on a GPU that is none, as far as a repeated call looks at them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

GPU, STREAM = 0, 7


class Tensor(torch.Tensor):  # type: ignore[misc]
    gpu, nth = GPU, 0

    def get_device(self) -> int:
        return self.gpu

    def new_empty(self, shape: Any, dtype: Any = None) -> Any:
        made = torch.Tensor.new_empty(self, shape, dtype=dtype or self.dtype)
        return made.as_subclass(Tensor)


def tensor(*shape: int, dtype: Any = torch.float16) -> Any:
    return torch.zeros(shape, dtype=dtype).as_subclass(Tensor)


def answers() -> SimpleNamespace:
    """What torch and CuPy answer; as on a GPU, where nothing is special."""
    return SimpleNamespace(
        classes=(Tensor,),
        strided=torch.strided,
        float32=torch.float32,
        empty_like=torch.empty_like,
        is_grad_enabled=torch.is_grad_enabled,
        is_autocast_enabled=lambda where: False,
        autocast_dtype=lambda where: torch.bfloat16,
        are_transforms_active=lambda: False,
        count_modes=lambda: 0,
        is_tracing=lambda: False,
        stream=lambda gpu: STREAM,
        forward_ad=SimpleNamespace(_current_level=-1),
        current_device=lambda: GPU,
        current_stream=lambda: SimpleNamespace(ptr=0),
        is_captured=lambda stream: False,
    )
