"""Arrays whose values or gradients attention() cannot see: refused here, by name.

What traces a program (``torch.compile``, ``jax.jit``) or differentiates it hands over arrays that
look like any other. To take those would lose a gradient, or make a constant of a result, silently.
torch and JAX are never imported for that: who has their arrays has imported them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

_Function = TypeVar("_Function", bound=Callable[..., Any])

_told: list[Any] = []  # torch's trace rules, once they know of this package


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
    rules.add(__name__.partition(".")[0])
    _told.append(rules)


def check_concrete(name: str, x: Any, kind: str) -> None:
    """Raise ``TypeError`` or ``ValueError`` for an array that is more, or less, than its memory.

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
        raise TypeError(
            f"{name}: got a tracer of JAX ({type(x).__name__}), which has no values yet; call "
            f"attention() outside of jit, vmap and grad, or through jax.pure_callback (it has no "
            f"gradient: give it jax.lax.stop_gradient({name}))"
        )
    elif kind == "torch proxy":
        raise TypeError(
            f"{name}: got a proxy of torch.fx, which has no values; call attention() outside of "
            f"what is traced, or make it a leaf with torch.fx.wrap"
        )


def _check_tensor(name: str, x: Any) -> None:
    torch = sys.modules["torch"]
    reason = _no_plain_memory(torch, x)
    if reason:
        raise TypeError(f"{name}: {reason}")
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name}: requires a gradient, which attention() does not have; pass {name}.detach(), "
            f"or call it under torch.no_grad()"
        )
    forward_ad = torch.autograd.forward_ad
    # Below level 0 nothing has a tangent; to ask for one takes longer than all else here.
    level = getattr(forward_ad, "_current_level", 0)
    if level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
        raise ValueError(
            f"{name}: has a tangent (forward-mode differentiation), which attention() would drop; "
            f"pass torch.autograd.forward_ad.unpack_dual({name}).primal"
        )


def _no_plain_memory(torch: Any, x: Any) -> str:
    """Say why a tensor is not just its elements in memory; empty if it is."""
    cls = x.__class__
    if cls.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return (
            f"got a {cls.__name__}, which keeps its elements in a way of its own; "
            f"use a plain torch.Tensor"
        )
    is_wrapped = getattr(torch._C._functorch, "is_functorch_wrapped_tensor", None)
    if is_wrapped is not None and is_wrapped(x):
        return (
            "got a tensor inside torch.func or torch.vmap, whose gradient, tangent or batch "
            "attention() would not see; call it outside of them"
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
