"""Arguments of ``attention``, each as an array of another kind, and what a refusal says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import flashcore_cupy

attention, explain = flashcore_cupy.attention, flashcore_cupy.explain
B, H, SQ, SKV, D = 1, 2, 5, 7, 8
OPERANDS = {"q": (B, H, SQ, D), "k": (B, H, SKV, D), "v": (B, H, SKV, D)}
#: Every argument that may be an array of floats, and a shape that it may have.
FLOATS = OPERANDS | {
    "bias": (SQ, SKV),
    "alibi_slopes": (H,),
    "sink": (H,),
    "softmax_scale": (),
    "softcap": (),
    "mod_args['x']": (3,),
    "out": (B, H, SQ, D),
}


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.5, 1.5, shape).astype(np.float32)


def arguments(convert: Callable[[np.ndarray], Any], name: str = "", odd: Any = None) -> Any:
    """q, k, v as ``convert`` makes them, and one argument of another kind."""
    given = {key: convert(numbers(*shape)) for key, shape in OPERANDS.items()}
    if name.startswith("mod_args"):
        given |= {"mod_args": {"x": odd}, "score_mod": lambda score, *at, x: score}
    elif name:
        given[name] = odd
    return given


def refusal(error: type[Exception], call: Callable[[], Any]) -> str:
    with pytest.raises(error) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def everywhere(name: str, error: type[Exception], given: Any) -> str:
    """What attention and explain say alike of an argument."""
    said = {refusal(error, lambda call=call: call(**given)) for call in (attention, explain)}
    assert len(said) == 1
    (message,) = said
    assert message.startswith(f"{name}: ")
    return message
