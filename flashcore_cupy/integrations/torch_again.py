"""Known calls on tensors that require a gradient: one autograd.Function around two lookups.

What ``torch_attention`` has done once for a call, with all its checks, is done here for its like:
the launch caches are asked, and what they know is launched. They know calls by their tensors'
sizes, strides, dtypes, alignment and GPU, and by all other arguments. Calls with rules' arrays,
with ``out``, ``stream`` or ``rng`` go through ``torch_attention``, whose two passes are known each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from flashcore_cupy.integrations import torch_attention
from flashcore_cupy.launch import backward_cache, launch_cache, tensors
from flashcore_cupy.launch.known_call import KnownCall
from flashcore_cupy.launch.launch_cache import FoundTensors
from flashcore_cupy.problem.attention_problem import MAX_ALIGN

_MOST_KINDS = 64  # of gradients of one known call; beyond, all are forgotten


def connect() -> None:
    """Have the launch cache leave known calls that require a gradient to this module.

    A torch that does not tell of its hooks keeps the long way.
    """
    if hasattr(getattr(torch._C, "_autograd", None), "_top_saved_tensors_default_hooks"):
        launch_cache.connect(attend_again)


def attend_again(q: Any, k: Any, v: Any, return_lse: bool, choices: tuple[Any, ...]) -> Any:
    """Launch a known call on tensors of which some require a gradient; None for the long way.

    That is taken:

    - by calls that are not known (``launch_cache.find_tensors``);
    - by tensors that are more than memory, on another GPU, or of a dtype that autocast changes; in
      modes, traces, captures, ``torch.func`` and forward-mode differentiation; on a stream of
      CuPy's (``tensors.place``, ``tensors.is_cast``);
    - where hooks take what is saved, as a checkpoint's do: they may give back other strides.

    torch.compile does not come here: it looks into ``dynamo.attention_in_graph``.
    """
    if torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
        return None
    found = launch_cache.find_tensors(q, k, v, True, choices)
    return None if found is None else KnownAttention.apply(q, k, v, found, return_lse)


class KnownAttention(torch.autograd.Function):
    """``torch_attention.Attention`` of a call that the launch cache knows."""

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, found: FoundTensors, return_lse: bool) -> Any:
        """Launch, and keep what the gradients take."""
        made = found.launch(q, True)
        if made is None:
            made = torch_attention.forward_of_tensors((q, k, v), "q k v", _options(found.choices))
        o, lse = made
        ctx.found = found
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.set_materialize_grads(False)
        return (o, lse) if return_lse else o

    @staticmethod
    def backward(ctx: Any, do: Any, dlse: Any = None) -> Any:
        """The gradients of what requires one."""
        found, saved, wanted = ctx.found, ctx.saved_tensors, ctx.needs_input_grad[:3]
        if _is_plain(do, dlse):
            gradients = _launch_again(found, wanted, do, saved)
            if gradients is not None:
                return *gradients, None, None
        options = _options(found.choices)
        gradients = torch_attention.gradients("q k v", options, saved, wanted, do, dlse)
        return *gradients, None, None


def _is_plain(do: Any, dlse: Any) -> bool:
    """Whether a backward pass is of the output alone, is no part of a graph, and has no gradient.

    The other passes take the long way.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    return do is not None and dlse is None


def _launch_again(
    found: FoundTensors, wanted: tuple[bool, ...], do: Any, saved: tuple[Any, ...]
) -> Sequence[Any] | None:
    """Launch a known backward pass: a gradient, or None, for each of q, k and v.

    None where do is not just memory, or what was saved is not as it was launched: a hook may have
    been put on it later, and a leaf may have got other ``data``.
    """
    place = tensors.place((do,))
    if place is None or place[0] != found.device or not found.holds(*saved):
        return None
    pdo = do.data_ptr()
    pq, pk, pv, po, plse = found.addresses
    # All else that the backward cache knows a pass by is the forward pass's, if alignment is.
    aligned = (pdo | pq | pk | pv | po | plse) % MAX_ALIGN == 0
    kind = (wanted, do.stride(), do.dtype)
    known = found.known.gradients.get(kind) if aligned else None
    if known is None:
        known = _ask(found, wanted, do, saved, kind if aligned else None)
    if known is None or launch_cache.is_other_environment():
        return None
    addresses = [pdo, pq, pk, pv, po, plse]
    gradients = backward_cache.launch_on_tensors(known, addresses, do, *place)
    if gradients is None or len(gradients) == len(wanted):
        return gradients
    upcoming = iter(gradients)
    return [next(upcoming) if is_wanted else None for is_wanted in wanted]


def _ask(
    found: FoundTensors,
    wanted: tuple[bool, ...],
    do: Any,
    saved: tuple[Any, ...],
    kind: tuple[Any, ...] | None,
) -> KnownCall | None:
    """What the backward cache knows of a pass; by its kind, if given, it is not asked again."""
    choices = _backward_choices(found.choices, wanted)
    known = backward_cache.find_tensors((do, *saved, None), found.device, choices)
    if known is not None and kind is not None:
        kinds = found.known.gradients
        if len(kinds) >= _MOST_KINDS:
            kinds.clear()
        kinds[kind] = known
    return known


def _options(choices: tuple[Any, ...]) -> dict[str, Any]:
    """A call's arguments beside its tensors, by what ``attention`` says that it is known by."""
    window, layout, kernel, causal, _, softcap, _, dropout_p, _, scale, _, invariant, _ = choices
    return dict(
        window=window, layout=layout, kernel=kernel, causal=causal, softcap=softcap,
        dropout_p=dropout_p, softmax_scale=scale, batch_invariant=invariant,
    )  # fmt: skip


def _backward_choices(choices: tuple[Any, ...], wanted: tuple[bool, ...]) -> tuple[Any, ...]:
    """What ``attention_backward`` says that the backward pass of such a call is known by."""
    window, layout, _, causal, _, softcap, _, dropout_p, _, scale, _, invariant, _ = choices
    others = (layout, "auto", causal, softcap, scale, dropout_p, invariant, True)
    wrt = tuple(name for name, is_wanted in zip("qkv", wanted, strict=True) if is_wanted)
    return (wrt, window, *others, *[x.__class__ for x in others])
