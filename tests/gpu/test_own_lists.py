"""Calls that ask their mask_mod ahead: repeated, captured, on other streams, of tensors."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
from helpers import runs_here

from flashcore_cupy import attention, explain
from flashcore_cupy.attention import plan
from flashcore_cupy.cpu.reference import compare, make_inputs, naive, oracle
from flashcore_cupy.launch import ruled_cache

B, H, S, D = 16, 16, 1024, 64  # as few scores as it pays for
RULE = "document[q_idx] == document[kv_idx] && q_idx >= kv_idx"


@pytest.fixture(scope="module")
def host() -> list[np.ndarray]:
    if not runs_here("mma_sm80"):
        pytest.skip("no kernel on this GPU walks over lists")
    return list(make_inputs("normal", batch=B, heads=H, seqlen=S, head_dim=D))


def documents(length: int) -> np.ndarray:
    return (np.arange(S) // length).astype(np.int32)


def check(got: Any, host: list[np.ndarray], length: int) -> None:
    document, rows = documents(length), np.arange(0, S, 37)
    dense = (document[:, None] == document) & np.tri(S, dtype=bool)
    one = [x[-1:, -2:] for x in host]
    expected, _ = oracle(*one, mask=dense, rows=rows)
    result = compare(got.get()[-1:, -2:, rows], expected, naive(*one, mask=dense, rows=rows))
    assert result.ok, result.reason


@pytest.mark.parametrize("kernel", ["auto", "mma_sm80"])
def test_each_call_gives_the_same_bits(
    host: list[np.ndarray], kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first, those that the launch cache knows, on another stream, and beside other calls."""
    import cupy

    monkeypatch.setattr(ruled_cache, "_known", {})
    given, table = [cupy.asarray(x) for x in host], cupy.asarray(documents(100))
    rules: dict[str, Any] = {"mask_mod": RULE, "mod_args": {"document": table}, "kernel": kernel}
    assert "mask_mod: asked ahead" in explain(*given, **rules)
    assert len(plan(*given, **rules).steps) == 3
    assert len(plan(*given, **rules, config={"own_lists": False}).steps) == 1
    first = attention(*given, **rules)
    check(first, host, 100)
    attention(*given, **rules)
    other = rules | {"mod_args": {"document": cupy.asarray(documents(333))}}
    stream = cupy.cuda.Stream(non_blocking=True)
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["flashcore_cupy.attention"], "bind", None)
        for _ in range(5):
            check(attention(*given, **other), host, 333)
            assert (attention(*given, **rules).view("u2") == first.view("u2")).all()
        with stream:
            again = attention(*given, **rules)
            stream.synchronize()
    assert (again.view("u2") == first.view("u2")).all()


def test_a_replay_asks_anew(host: list[np.ndarray]) -> None:
    import cupy

    given, table = [cupy.asarray(x) for x in host], cupy.asarray(documents(100))
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        stream.begin_capture(cupy.cuda.runtime.streamCaptureModeRelaxed)
        o = attention(*given, mask_mod=RULE, mod_args={"document": table})
        graph = stream.end_capture()
    junk = [cupy.full(2**n, 171, cupy.uint8) for n in range(9, 24)]  # where lists may not lie
    for length in (100, 1024, 5, 100):
        table.set(documents(length))
        cupy.cuda.Device().synchronize()
        graph.launch(stream)
        stream.synchronize()
        check(o, host, length)
    assert all(bool((x == 171).all()) for x in junk)


def test_tensors(host: list[np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    import cupy

    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch has no GPU")
    monkeypatch.setattr(ruled_cache, "_known", {})
    given = [torch.from_numpy(x).cuda() for x in host]
    for length in (100, 200, 300):
        table = torch.from_numpy(documents(length)).cuda()
        o = attention(*given, mask_mod=RULE, mod_args={"document": table})
        check(cupy.from_dlpack(o), host, length)
    assert len(ruled_cache._known) == 1
