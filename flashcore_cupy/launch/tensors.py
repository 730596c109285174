"""Tensors of torch as the launch caches take them: as addresses, without arrays of CuPy's between.

To see a tensor as an array of CuPy's, and a result as a tensor, takes as long as all else of a
repeated call. Only tensors that are just memory come this way, on the current GPU, in no trace, no
capture and no transform. The long way knows the others, and says what is wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable
from types import SimpleNamespace
from typing import Any

#: What is asked of torch and of CuPy at each call; None until ``connect``.
_asked: Any = None


def connect(given: Collection[Any]) -> bool:
    """Whether arrays are tensors, and torch lets itself be asked about them; from here on it is."""
    global _asked
    torch = sys.modules.get("torch")
    if not given or torch is None or not all(isinstance(x, torch.Tensor) for x in given):
        return False
    if _asked is None:
        import cupy

        c = torch._C
        try:  # private names of torch, which another version may not have
            _asked = SimpleNamespace(
                classes=(torch.Tensor, torch.nn.Parameter),
                strided=torch.strided,
                float32=torch.float32,
                empty_like=torch.empty_like,
                is_grad_enabled=torch.is_grad_enabled,
                is_autocast_enabled=torch.is_autocast_enabled,
                autocast_dtype=torch.get_autocast_dtype,
                are_transforms_active=c._are_functorch_transforms_active,
                count_modes=c._len_torch_dispatch_stack,
                is_tracing=c._is_tracing,
                stream=c._cuda_getCurrentRawStream,
                forward_ad=torch.autograd.forward_ad,
                current_device=cupy.cuda.runtime.getDevice,
                current_stream=cupy.cuda.get_current_stream,
                is_captured=cupy.cuda.runtime.streamIsCapturing,
            )
            _asked.forward_ad._current_level  # noqa: B018
        except AttributeError:
            _asked = None
            return False
    return True


def place(given: Iterable[Any], *, gradients: bool = False) -> tuple[int, int] | None:
    """The GPU and the stream of a call on tensors (or None) that are just memory; else None.

    The stream is torch's current one; where CuPy's is another that the caller has chosen, the long
    way decides. ``gradients``: tensors that require one are taken as well.
    """
    asked = _asked
    if asked is None or asked.count_modes() or asked.are_transforms_active() or asked.is_tracing():
        return None
    if asked.forward_ad._current_level >= 0:
        return None
    classes, strided = asked.classes, asked.strided
    differentiates = not gradients and asked.is_grad_enabled()
    gpu = asked.current_device()
    for x in given:
        if x is not None and (
            x.__class__ not in classes
            or x.get_device() != gpu
            or x.layout is not strided
            or x.is_nested
            or x.is_neg()
            or (differentiates and x.requires_grad)
        ):
            return None
    stream = asked.stream(gpu)
    chosen = asked.current_stream().ptr
    if chosen and chosen != stream:
        return None
    if stream > 1 and asked.is_captured(stream):
        return None  # what it allocates is the graph's
    return gpu, stream


def differentiates(q: Any, k: Any, v: Any) -> bool:
    """Whether these are tensors of which some require a gradient, as all of a call may be."""
    asked = _asked
    return (
        asked is not None
        and q.__class__ in asked.classes
        and k.__class__ in asked.classes
        and v.__class__ in asked.classes
        and (q.requires_grad or k.requires_grad or v.requires_grad)
        and asked.is_grad_enabled()
    )


def is_cast(dtype: Any) -> bool:
    """Whether torch's autocast is on and would make another dtype of this one."""
    return _asked.is_autocast_enabled("cuda") and _asked.autocast_dtype("cuda") is not dtype


def form(x: Any) -> tuple[Any, ...]:
    """What a launch depends on of a tensor, but its address: its sizes, strides and dtype."""
    return (x.shape, x.stride(), x.dtype)


def forms(q: Any, k: Any, v: Any) -> tuple[Any, ...]:
    """The same of three."""
    return (
        q.shape, q.stride(), q.dtype, k.shape, k.stride(), k.dtype, v.shape, v.stride(), v.dtype,
    )  # fmt: skip


def pattern(q: Any, shape: tuple[int, ...], *, float32: bool = False) -> Any:
    """What ``like`` makes new tensors from: one element where q is, shown in a shape.

    To make a tensor like another takes two thirds of the time that it takes from a shape.
    """
    dtype = _asked.float32 if float32 else q.dtype
    return q.detach().new_empty((1,) * len(shape), dtype=dtype).expand(shape)


def like(patterns: Iterable[Any]) -> list[Any]:
    """New contiguous tensors; torch's own memory."""
    empty_like = _asked.empty_like
    return [empty_like(x) for x in patterns]
