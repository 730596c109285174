"""Repeated calls with rules: what the launch cache launches gives the bits of the long way."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

from flashcore_cupy import attention, attention_backward, block_mask
from flashcore_cupy.launch import backward_cache, ruled_cache
from flashcore_cupy.problem.gradients import by_result

B, H, S, T, D = 2, 4, 300, 400, 64


def new(*shape: int, dtype: str = "float16", seed: int = 0) -> Any:
    import cupy

    rng = np.random.default_rng(seed + sum(shape))
    if dtype == "bool":
        return cupy.asarray(rng.random(shape) < 0.7)
    return cupy.asarray(rng.standard_normal(shape).astype(dtype))


def operands(seed: int) -> tuple[Any, Any, Any]:
    return tuple(new(B, heads, n, D, seed=seed + heads) for heads, n in ((H, S), (2, T), (2, T)))


def rules_of(name: str, seed: int) -> dict[str, Any]:
    if name == "mask":
        return {"mask": new(S, T, dtype="bool", seed=seed), "causal": True}
    if name == "bias, slopes, sink":
        slopes, sink = (new(H, dtype="float32", seed=seed + n) for n in (1, 2))
        return {"bias": new(1, H, S, T, seed=seed), "alibi_slopes": slopes, "sink": sink}
    if name == "mods":
        mods = {"score_mod": "score * (1.0f + x[h])", "mask_mod": "(q_idx + kv_idx) % 3 != b"}
        return {**mods, "mod_args": {"x": new(H, dtype="float32", seed=seed)}}
    if name == "dropout":
        return {"dropout_p": 0.3, "rng": (seed, 2**64 - 1 - seed)}
    first = new(1, dtype="float32", seed=seed).astype("int32") * 30 + 100
    made = block_mask(
        "kv_idx >= first[0] || q_idx < 128",
        mod_args={"first": first},
        seqlen_q=S,
        seqlen_kv=T,
    )
    return {"block_mask": made}


NAMES = ["mask", "bias, slopes, sink", "mods", "dropout", "block mask"]


def closed(patch: pytest.MonkeyPatch, module: str, name: str) -> None:
    def take(*_: Any, **__: Any) -> None:
        raise AssertionError("the long way")

    patch.setattr(sys.modules[module], name, take)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kernel", ["auto", "mma_sm80"])
def test_calls(name: str, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ruled_cache, "_known", {})
    for _ in range(2):  # kept when it comes again
        attention(*operands(0), **rules_of(name, 0), kernel=kernel, return_lse=True)
    assert len(ruled_cache._known) == 1
    for seed in (10, 20):
        given, rules = operands(seed), rules_of(name, seed)
        with monkeypatch.context() as patch:
            closed(patch, "flashcore_cupy.attention", "bind")
            got = attention(*given, **rules, kernel=kernel, return_lse=True)
        want = attention(*given, **rules, kernel=kernel, return_lse=True, config={})
        for x, y in zip(got, want, strict=True):
            assert x.get().tobytes() == y.get().tobytes()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("deterministic", [True, False])
def test_gradients(name: str, deterministic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backward_cache, "_known", {})
    wrt = ("q", "k", "v", *(("bias", "alibi_slopes", "sink") if "bias" in name else ()))

    def given(seed: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        rules = rules_of(name, seed)
        o, lse = attention(*operands(seed), **rules, return_lse=True)
        return (new(*o.shape, seed=seed + 9), *operands(seed), o, lse), rules

    def run(arrays: Any, rules: Any, **more: Any) -> Any:
        return attention_backward(*arrays, **rules, wrt=wrt, deterministic=deterministic, **more)

    for _ in range(2):  # kept when it comes again
        run(*given(0))
    assert len(backward_cache._known) == 1
    for seed in (10, 20):
        arrays, rules = given(seed)
        with monkeypatch.context() as patch:
            closed(patch, "flashcore_cupy.backward", "bind_backward")
            got = by_result(run(arrays, rules))
        want = by_result(run(arrays, rules, config={}))
        for result, x in got.items():
            if deterministic:
                assert x.get().tobytes() == want[result].get().tobytes(), result
            else:
                np.testing.assert_allclose(x.get(), want[result].get(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", NAMES)
def test_tensors(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch has no GPU")
    monkeypatch.setattr(ruled_cache, "_known", {})

    def given(seed: int) -> tuple[list[Any], dict[str, Any]]:
        import cupy

        def tensor(x: Any) -> Any:
            return torch.from_dlpack(x) if isinstance(x, cupy.ndarray) else x

        rules = {n: tensor(x) for n, x in rules_of(name, seed).items()}
        if "mod_args" in rules:
            rules["mod_args"] = {n: tensor(x) for n, x in rules["mod_args"].items()}
        return [tensor(x) for x in operands(seed)], rules

    for _ in range(2):  # kept when it comes again
        arrays, rules = given(0)
        attention(*arrays, **rules)
    assert len(ruled_cache._known) == 1
    arrays, rules = given(10)
    with monkeypatch.context() as patch:
        closed(patch, "flashcore_cupy.attention", "bind")
        got = attention(*arrays, **rules)
    assert isinstance(got, torch.Tensor)
    assert torch.equal(got, attention(*arrays, **rules, config={}))
