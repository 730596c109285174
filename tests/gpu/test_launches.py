"""Launches that overlap wait for each other, enqueued and captured into a graph."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import runs_here

from flashcore_cupy import attention
from flashcore_cupy.attention import plan
from flashcore_cupy.cpu.reference import make_inputs
from flashcore_cupy.cuda.driver import OverlappingLaunch, can_overlap_launches
from flashcore_cupy.cuda.targets import HOPPER
from flashcore_cupy.jit import compiler

COUNT = 24


@pytest.fixture(autouse=True)
def hopper() -> None:
    """Other GPUs have no kernel whose launches overlap."""
    if not (runs_here("cluster_sm90") and can_overlap_launches()):
        pytest.skip("needs Hopper, and a driver that lets launches overlap")


def twice(run: Callable[[], None], *, is_captured: bool) -> None:
    """Enqueue what ``run`` launches two times on a stream of its own, or replay it as a graph."""
    import cupy

    cupy.cuda.Device().synchronize()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream, contextlib.ExitStack() as last:
        last.callback(stream.synchronize)
        if is_captured:
            stream.begin_capture()
            run()
            graph = stream.end_capture()
            last.callback(lambda: graph)
            run = graph.launch
        for _ in range(2):
            run()


@pytest.mark.parametrize("is_captured", [False, True])
def test_each_launch_sees_what_the_one_before_it_wrote(
    is_captured: bool, probe_folder: Path
) -> None:
    """Blocks of a probe write late, when the next launch has long begun."""
    import cupy

    module = compiler.load(compiler.compile_kernel("probe_launches.cu", {}, HOPPER))
    launch = OverlappingLaunch(module.get_function("add_one").ptr, 20, 64, 0)
    x, y = (cupy.zeros(20 * 64, cupy.float32) for _ in range(2))
    values = [(ctypes.c_uint64 * 2)(*pair) for pair in ((x.data.ptr, y.data.ptr),) * 2]
    values[1][0], values[1][1] = y.data.ptr, x.data.ptr
    lists = []
    for own in values:
        first = ctypes.addressof(own)
        lists.append((ctypes.c_uint64 * 2)(first, first + 8))

    def run() -> None:
        for n in range(COUNT):
            launch(cupy.cuda.get_current_stream().ptr, ctypes.addressof(lists[n % 2]))

    twice(run, is_captured=is_captured)
    assert (x.get() == 2 * COUNT).all()
    assert (y.get() == 2 * COUNT - 1).all()


#: With this scale a row is about one of v's, another one each time: no chain comes to rest.
SCALE = 4.0
#: Batch, heads, queries and keys, head dim; rules.
CHAINS: dict[str, tuple[tuple[int, int, int, int], dict[str, Any]]] = {
    "one warpgroup": ((1, 8, 128, 64), {}),
    "two blocks": ((1, 8, 256, 64), {}),
    "four warpgroups": ((1, 8, 512, 64), {"causal": True}),
    "three stages": ((1, 8, 1024, 64), {}),
    "wide": ((1, 8, 256, 128), {}),
}


@pytest.mark.parametrize("is_captured", [False, True])
@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_gives_what_launches_one_by_one_give(name: str, is_captured: bool) -> None:
    """The output of each is the q of the next; then the other way round, over what was read."""
    import cupy

    (batch, heads, seqlen, head_dim), rules = CHAINS[name]
    sizes = {"batch": batch, "heads": heads, "seqlen": seqlen, "head_dim": head_dim}
    q, k, v = (cupy.asarray(x) for x in make_inputs("normal", seed=5, **sizes))
    one, other = q.copy(), cupy.empty_like(q)
    there, back = (
        plan(source, k, v, out=out, kernel="cluster_sm90", softmax_scale=SCALE, **rules)
        for source, out in ((one, other), (other, one))
    )

    def run() -> None:
        for _ in range(COUNT // 4):
            there.launch()
            back.launch()

    twice(run, is_captured=is_captured)
    got, between = one.get(), other.get()
    one[...] = q
    for bound in (there, back):
        bound.steps = tuple(replace(step, overlapping=None) for step in bound.steps)
    twice(run, is_captured=False)
    assert np.isfinite(got).all()
    assert (got != between).any()
    assert np.array_equal(got, one.get())
    assert np.array_equal(between, other.get())


def test_repeated_calls_wait_for_each_other() -> None:
    """Each by its own launch, as remembered; outputs take the memory of those that are gone."""
    import cupy

    q, k, v = (
        cupy.asarray(x)
        for x in make_inputs("normal", seed=6, batch=1, heads=8, seqlen=512, head_dim=64)
    )
    x, expected = q, q
    for _ in range(COUNT):
        x = attention(x, k, v, softmax_scale=SCALE)
    for _ in range(COUNT):
        bound = plan(expected, k, v, softmax_scale=SCALE)
        bound.launch()
        cupy.cuda.Device().synchronize()
        expected = bound.arrays["o"]
    assert np.array_equal(x.get(), expected.get())
