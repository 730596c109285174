"""What captured calls own: when it is freed, what is copied once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from flashcore_cupy.cuda import captures
from flashcore_cupy.problem import varlen


@contextlib.contextmanager
def _noting(entered: list[str], name: str) -> Iterator[None]:
    assert 2 in captures._kept, "nothing is freed before"
    entered.append(name)
    yield


def test_what_graphs_own_is_freed_once_they_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captures, "_kept", {1: ["a"], 2: ["b"]})
    entered: list[str] = []
    for name in ("_relaxed", "beside"):
        monkeypatch.setattr(captures, name, lambda name=name: _noting(entered, name))
    captures.give_back()
    assert not entered, "which would cost each call"
    assert captures._kept == {1: ["a"], 2: ["b"]}
    captures._is_gone(2)  # as the driver calls it
    captures._is_gone(3)  # of a process before a fork, say
    captures.give_back()
    assert captures._kept == {1: ["a"]}
    assert not captures._gone
    assert entered == ["_relaxed", "beside"]


def test_boundaries_are_copied_once_per_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    from collections import OrderedDict

    copies: list[Any] = []
    monkeypatch.setattr(varlen, "_copies", OrderedDict())
    monkeypatch.setattr(varlen, "_MOST_COPIES", 2)
    monkeypatch.setattr(varlen, "stream_key", lambda: (0, stream, 0))
    monkeypatch.setattr(captures, "on_gpu", lambda x: copies.append(x) or [x])
    stream, bounds = 7, np.array([0, 5], np.int32)
    first = varlen.on_gpu(bounds)
    assert varlen.on_gpu(bounds.copy()) is first and len(copies) == 1
    stream = 8
    assert varlen.on_gpu(bounds) is not first, "the other stream does not wait for the first"
    varlen.on_gpu(np.array([0, 6], np.int32))
    assert len(varlen._copies) == 2
    stream = 7
    assert varlen.on_gpu(bounds) is not first
    monkeypatch.setattr(captures, "is_active", lambda: True)
    assert varlen.on_gpu(bounds) is not varlen.on_gpu(bounds), "a graph has its own"
