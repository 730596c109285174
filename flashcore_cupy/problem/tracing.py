"""Arrays that are more, or less, than their memory: told apart here, by name.

What traces a program or differentiates it hands over arrays that look like any other. To take those
would lose a gradient, or make a constant of a result, silently. ``Traced`` says so, and attention()
then leaves the call to ``integrations``. What nothing can be done with is refused. torch and JAX
are never imported for that: who has their arrays has imported them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Literal, TypeVar

_Function = TypeVar("_Function", bound=Callable[..., Any])

_told: list[Any] = []  # torch's trace rules, once they know of this package
#: What torch.compile is to call as it is. The rest is ``integrations``, which it looks into.
_LEFT_ALONE = ("attention", "backward", "cpu", "cuda", "jit", "launch", "problem", "select")


class Traced(TypeError):
    """An array has a gradient, or is traced: attention() has its integration do the call."""

    def __init__(self, name: str, by: Literal["torch", "jax"], what: str) -> None:
        super().__init__(f"{name}: {what}")
        self.by = by


def untraced(function: _Function) -> _Function:
    """Have torch.compile call a function as it is, as ``torch.compiler.disable`` would.

    That sets these attributes on a wrapper; on the function itself they cost no call, and need no
    torch.
    """
    function.__dict__["_torchdynamo_disable"] = True
    function.__dict__["_torchdynamo_disable_msg"] = "torch does not know flashcore_cupy's kernels"
    return function


@untraced
def leave_dynamo() -> None:
    """Have torch.compile leave all functions of this package alone, from here on.

    ``untraced`` keeps a function out of its callers' graphs. But torch's compiler also looks at
    each Python function that then runs with a tensor among its arguments, to compile that. This
    one has none, so it runs as it is, and tells the compiler of the whole package.
    """
    rules = sys.modules.get("torch._dynamo.trace_rules")
    if rules is None or rules in _told:
        return
    for name in _LEFT_ALONE:
        rules.add(f"{__name__.partition('.')[0]}.{name}")
    _told.append(rules)


def check_concrete(name: str, x: Any, kind: str) -> None:
    """Raise ``Traced``, ``TypeError`` or ``ValueError`` for an array that is not just its memory.

    ``kind``: as ``interop`` tells them.
    """
    if kind == "torch":
        _check_tensor(name, x)
    elif kind == "masked":
        raise TypeError(
            f"{name}: got a masked array, whose mask attention() would not see; use "
            f"{name}.filled(...), or {name}.data as it is"
        )
    elif kind == "jax" and x.is_deleted():
        raise ValueError(f"{name}: this JAX array was deleted, or donated to a jitted function")
    elif kind == "jax tracer":
        raise Traced(
            name,
            "jax",
            f"got a tracer of JAX ({type(x).__name__}), which has no value yet; only attention() "
            f"takes tracers, as arrays of numbers or of truths",
        )
    elif kind == "torch proxy":
        raise TypeError(
            f"{name}: got a proxy of torch.fx, which has no values; call attention() outside of "
            f"what is traced, or make it a leaf with torch.fx.wrap"
        )


def _check_tensor(name: str, x: Any) -> None:
    torch = sys.modules["torch"]
    traced = _why_traced(torch, x)
    if traced:
        raise Traced(name, "torch", traced)
    reason = _no_plain_memory(torch, x)
    if reason:
        raise TypeError(f"{name}: {reason}")
    if x.requires_grad and torch.is_grad_enabled():
        raise Traced(
            name,
            "torch",
            f"requires a gradient, which only attention() gives; pass {name}.detach(), or call it "
            f"under torch.no_grad()",
        )
    forward_ad = torch.autograd.forward_ad
    # Below level 0 nothing has a tangent; to ask for one takes longer than all else here.
    level = getattr(forward_ad, "_current_level", 0)
    if level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
        raise ValueError(
            f"{name}: has a tangent (forward-mode differentiation), which attention() would drop; "
            f"pass torch.autograd.forward_ad.unpack_dual({name}).primal"
        )


def _why_traced(torch: Any, x: Any) -> str:
    """Say what records operators on a tensor; empty if nothing does."""
    is_wrapped = getattr(torch._C._functorch, "is_functorch_wrapped_tensor", None)
    if is_wrapped is not None and is_wrapped(x):
        return "got a tensor inside torch.func or torch.vmap, where only attention() may be called"
    modes = getattr(torch._C, "_len_torch_dispatch_stack", None)
    cls = x.__class__
    is_fake = cls is not torch.Tensor and cls.__module__.startswith("torch._subclasses.")
    if is_fake or (modes and modes()):
        return "got a tensor that torch traces, where only attention() may be called"
    return ""


def _no_plain_memory(torch: Any, x: Any) -> str:
    """Say why a tensor is not just its elements in memory; empty if it is."""
    cls, own = x.__class__, torch.Tensor
    if cls is not own and cls.__torch_dispatch__ is not own.__torch_dispatch__:
        return (
            f"got a {cls.__name__}, which keeps its elements in a way of its own; "
            f"use a plain torch.Tensor"
        )
    if torch.jit.is_tracing():
        return (
            "got a tensor inside torch.jit.trace, which would keep the result as a constant; "
            "call attention() outside of what is traced"
        )
    if x.is_nested:
        return "got a nested tensor; pack the rows of all sequences, and give cu_seqlens"
    if x.layout is not torch.strided:
        return f"got a tensor of layout {x.layout}; use .to_dense()"
    if x.is_meta:
        return "got a tensor on the meta device, which has no values; move it to a GPU or the CPU"
    if x.is_neg():
        return "got a view whose sign is not applied yet; use .resolve_neg()"
    return ""
