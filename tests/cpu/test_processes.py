"""Attention on NumPy arrays where threads are refused, and where NumPy raises."""

from __future__ import annotations

import threading
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import flashcore_cupy
from flashcore_cupy.cpu import parallel

# --- attention on NumPy arrays where threads are refused ----------------------------------------


def inputs() -> list[np.ndarray[Any, Any]]:
    """Of several tasks, so that threads are wanted."""
    rng = np.random.default_rng(0)
    return [rng.standard_normal((2, 4, 600, 16), np.float32) for _ in range(3)]


@pytest.fixture
def cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as make several threads worth it, whatever this machine has."""
    monkeypatch.setattr(parallel, "cores", lambda: 4)


@pytest.mark.parametrize("allowed", [0, 1, 2])
def test_attention_where_no_more_threads_start(
    cores: None, monkeypatch: pytest.MonkeyPatch, allowed: int
) -> None:
    q, k, v = inputs()
    expected, lse = flashcore_cupy.attention(q, k, v, return_lse=True)
    started: list[threading.Thread] = []
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if len(started) == allowed:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    got = flashcore_cupy.attention(q, k, v, return_lse=True)
    assert len(started) == allowed
    np.testing.assert_array_equal(got[0], expected)
    np.testing.assert_array_equal(got[1], lse)


@pytest.mark.parametrize("threads", [True, False])
@pytest.mark.parametrize("error", [RuntimeError, StopIteration, KeyboardInterrupt])
def test_an_error_of_the_users_own_is_raised(
    cores: None, monkeypatch: pytest.MonkeyPatch, threads: bool, error: type[BaseException]
) -> None:
    """That of the first task, however many fail."""
    q, k, v = inputs()

    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        raise error(f"batch {int(np.max(b))} head {int(np.max(h))}")

    if not threads:
        monkeypatch.setattr(parallel.threading, "Thread", _no_thread)
    with pytest.raises(error, match="batch 0 head 0"):
        flashcore_cupy.attention(q, k, v, score_mod=score_mod)


def _no_thread(**_: object) -> None:
    raise RuntimeError("can't start new thread")


def test_an_error_in_one_task_is_not_lost(cores: None) -> None:
    q, k, v = inputs()

    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        if np.max(b) == 1 and np.max(h) == 3:
            raise RuntimeError("the last head")
        return score

    with pytest.raises(RuntimeError, match="the last head"):
        flashcore_cupy.attention(q, k, v, score_mod=score_mod)


def test_attention_in_a_daemon_thread(cores: None) -> None:
    q, k, v = inputs()
    got: list[Any] = []
    thread = threading.Thread(
        target=lambda: got.append(flashcore_cupy.attention(q, k, v)), daemon=True
    )
    thread.start()
    thread.join(timeout=60)
    np.testing.assert_array_equal(got[0], flashcore_cupy.attention(q, k, v))


# --- NumPy told to raise ------------------------------------------------------------------------


def _calls() -> dict[str, dict[str, Any]]:
    rng = np.random.default_rng(1)
    hidden = rng.random((70, 50)) < 0.5
    rows = np.zeros((70, 1), bool)
    lowest = np.finfo(np.float32).min
    packed = {"cu_seqlens_q": np.array([0, 30, 70]), "cu_seqlens_k": np.array([0, 0, 50])}
    return {
        "plain": {},
        "causal": {"causal": True},
        "bias of -inf": {"bias": np.where(hidden, -np.inf, 0).astype(np.float32)},
        "lowest bias": {"bias": np.where(hidden, lowest, 0).astype(np.float32)},
        "mask": {"mask": hidden},
        "no key": {"mask": rows},
        "tiny softcap": {"softcap": 1e-30},
        "large softcap": {"softcap": 1e30},
        "sinks": {"sink": np.array([-np.inf, 900], np.float32)},
        "slopes": {"alibi_slopes": np.array([1e-30, 1e30], np.float32)},
        "large scale": {"softmax_scale": 1e30},
        "tiny scale": {"softmax_scale": 1e-40},
        "packed": packed,
        "packed, causal": packed | {"causal": True},
    }


GATES = (None, "qk", "softmax", "pv")


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize(
    ("name", "gate"),
    [(name, gate) for name in _calls() for gate in GATES[: 1 if "packed" in name else None]],
)
def test_numpy_that_raises_has_nothing_to_raise(name: str, gate: str | None, dtype: Any) -> None:
    rules = _calls()[name]
    rng = np.random.default_rng(0)
    size = 60 if dtype == np.float16 else 1e15
    q, k, v = (
        (rng.standard_normal((1, 2, length, 32)) * size).astype(dtype) for length in (70, 50, 50)
    )
    v[..., 0] = np.inf
    if "cu_seqlens_q" in rules:
        q, k, v = (np.ascontiguousarray(x[0].swapaxes(0, 1)) for x in (q, k, v))
    quiet = flashcore_cupy.attention(q, k, v, gate=gate, **rules)
    with np.errstate(all="raise"):
        loud = flashcore_cupy.attention(q, k, v, gate=gate, **rules)
        flashcore_cupy.explain(q, k, v, gate=gate, **rules)
    np.testing.assert_array_equal(loud.astype(np.float64), quiet.astype(np.float64))
