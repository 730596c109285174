"""Plain arguments, flags and numbers, and how a message shows what was given instead.

Nothing here knows of attention, or of any array library.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from numbers import Real
from typing import Any

import numpy as np

_SHOWN = 80  # letters of a value in a message

# What other libraries call things, and ours: a name of ours, or else what to do instead.
_ELSEWHERE = {
    "alibi": "alibi_slopes",
    "attention_mask": "mask (boolean, True where a query attends) or bias (added to the scores)",
    "attn_bias": "bias",
    "attn_mask": "mask (boolean, True where a query attends) or bias (added to the scores)",
    "cu_seqlens": "cu_seqlens_q and cu_seqlens_k",
    "cu_seqlens_kv": "cu_seqlens_k",
    "deterministic": "nothing: the same call always gives the same bits",
    "dropout": "dropout_p",
    "enable_gqa": "nothing: k and v may have fewer heads than q",
    "implementation": "kernel",
    "is_causal": "causal (True is aligned at the bottom right, 'top-left' as torch's)",
    "kernel_options": "config",
    "key_padding_mask": "mask (boolean, True where a query attends)",
    "logits_soft_cap": "softcap",
    "max_seqlen_k": "nothing: cu_seqlens_k tells the lengths",
    "max_seqlen_kv": "nothing: cu_seqlens_k tells the lengths",
    "max_seqlen_q": "nothing: cu_seqlens_q tells the lengths",
    "need_weights": "gate='softmax' for the probabilities, or return_lse",
    "p_dropout": "dropout_p",
    "qk_scale": "softmax_scale",
    "qkv_format": "layout",
    "return_attn_probs": "gate='softmax' for the probabilities, or return_lse",
    "return_softmax_lse": "return_lse",
    "s_aux": "sink",
    "scale": "softmax_scale",
    "scaling": "softmax_scale",
    "sliding_window": "window",
    "sm_scale": "softmax_scale",
    "tensor_layout": "layout",
    "window_size": "window",
}


def shown(value: object) -> str:
    """Return ``repr`` in one line, cut short; of an array its type and shape alone."""
    try:
        text = "" if getattr(value, "shape", ()) else " ".join(repr(value).split())
    except Exception:  # of an object that is not ours, or an int of too many digits
        text = ""
    return _kind(value) if not text else text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def check_flag(name: str, value: object) -> bool:
    """Return True or False, NumPy's taken as well; ``TypeError`` for anything else."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name}: got {shown(value)}; use True or False")
    return bool(value)


def check_number(name: str, value: object, otherwise: str) -> Any:
    """Return a real number as it is; ``TypeError`` for anything else, truths included.

    ``otherwise``: what stands for no number, such as "0 for none".
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: got {_kind(value)}; use a number, or {otherwise}")
    return value


def check_names(function: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise ``TypeError`` for the first name given that is not known, and say what to use."""
    names = set(known)
    for name in given:
        if name in names:
            continue
        meant = [name] if name in _ELSEWHERE else get_close_matches(name, {*names, *_ELSEWHERE}, 1)
        ours = _ELSEWHERE.get(meant[0], meant[0]) if meant else ""
        unneeded = ours.partition("nothing: ")[2]
        hint = f"; leave it out: {unneeded}" if unneeded else f": use {ours}" if ours else ""
        raise TypeError(f"{function}() has no argument {name!r}{hint}")


def _kind(value: object) -> str:
    """Name the type, and of an array the shape."""
    kind = type(value).__name__
    try:
        shape = tuple(getattr(value, "shape", ()))
    except Exception:  # as a nested tensor's, which has none
        shape = ()
    return f"{kind} of shape {shape}" if shape else kind
