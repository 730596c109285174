"""Repeated calls with rules on tensors of torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cases_repeats import Arrays, B, D, H, S, T, lists, no_gpu
from noted_launches import Array

from flashcore_cupy import attention
from flashcore_cupy.launch import bind, ruled_cache, tensors
from flashcore_cupy.problem.block_mask import BlockMask
from flashcore_cupy.problem.request import Request
from flashcore_cupy.problem.rules import NO_WINDOW

torch = pytest.importorskip("torch")
from noted_tensors import answers, tensor  # noqa: E402


def of_tensors(x: Any) -> Any:
    """What the long way sees: the memory of tensors as CuPy's arrays."""
    if isinstance(x, dict):
        return {name: of_tensors(value) for name, value in x.items()}
    if isinstance(x, BlockMask):
        return replace(x, arrays=of_tensors(x.arrays))
    if isinstance(x, tuple) or not hasattr(x, "data_ptr"):
        return x
    return Array(tuple(x.shape), str(x.dtype).removeprefix("torch."), x.data_ptr())


@pytest.mark.parametrize("name", ["mask", "dropout", "block mask", "mods"])
@pytest.mark.parametrize("lse", [False, True])
def test_tensors(monkeypatch: pytest.MonkeyPatch, name: str, lse: bool) -> None:
    driver = no_gpu(monkeypatch, movable=True)
    asked = answers()
    monkeypatch.setattr(tensors, "_asked", asked)
    monkeypatch.setattr(tensors, "connect", lambda given: bool(given))

    def make() -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = tensor(B, H, S, D), tensor(B, 2, T, D), tensor(B, 2, T, D)
        if name == "mask":
            return given, {"mask": tensor(S, T, dtype=torch.bool)}
        if name == "dropout":
            return given, {"dropout_p": 0.25, "rng": (given[0].data_ptr(), 3)}
        if name == "mods":
            return given, {"score_mod": "score * x[h]", "mod_args": {"x": tensor(H)}}
        lists_of_cupy = lists(Arrays(given[0].data_ptr()), mask_mod="kv_idx < q_idx")
        return given, {"block_mask": lists_of_cupy}

    given, rules = make()
    defaults = attention.__kwdefaults__ or {}
    request = Request.of({n: x for n, x in of_tensors(rules).items()})
    call = request.call(*map(of_tensors, given), None, on_gpu=True)
    bound = bind.bind(call, want_lse=lse, own_workspace=False)
    rules.pop("dropout_p", None)
    choices = (NO_WINDOW, "bhsd", defaults["kernel"], 0.0, float)
    for _ in range(2):
        ruled_cache.remember(
            bound, given, rules, choices, mod_args=[*call.mod_args], out_given=False
        )
    assert len(ruled_cache._known) == 1

    def again(given: Any, rules: dict[str, Any]) -> Any:
        return ruled_cache.launch_again(*given, None, lse, choices, rules)

    given, rules = make()
    rules.pop("dropout_p", None)
    made = again(given, rules)
    o, *rest = made if lse else (made,)
    assert (o.shape, o.dtype) == ((B, H, S, D), torch.float16) and len(rest) == lse
    assert not lse or (rest[0].shape, rest[0].dtype) == ((B, H, S), torch.float32)
    words = np.frombuffer(driver.launches[-1].contents, np.uint64).tolist()
    assert words[:5] == [*(x.data_ptr() for x in (*given, o)), rest[0].data_ptr() if lse else 0]
    taken = ruled_cache.take_apart(rules)
    assert {x.data.ptr if isinstance(x, Array) else x.data_ptr() for x in taken.arrays} <= {
        *words, *np.frombuffer(driver.launches[0].contents, np.uint64).tolist(),
    }  # fmt: skip
    asked.is_autocast_enabled = lambda where: True
    assert again(given, rules) is None
    asked.is_autocast_enabled = lambda where: False
    assert again((given[0].requires_grad_(), *given[1:]), rules) is None
    with torch.no_grad():
        assert again(given, rules) is not None
    assert again((of_tensors(given[0]), *given[1:]), rules) is None
