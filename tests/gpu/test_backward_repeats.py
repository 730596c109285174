"""The same backward call gives the same bits, whatever scratch memory holds and whoever else works.

``bwd_sm90`` adds to dq in turns of thread blocks: who comes first differs from call to call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from cases_gradients import random

from flashcore_cupy import attention, attention_backward
from flashcore_cupy.attention import plan
from flashcore_cupy.backward import plan_backward
from flashcore_cupy.cuda.targets import HOPPER
from flashcore_cupy.jit import compiler
from flashcore_cupy.problem.attention_problem import MAX_ALIGN
from flashcore_cupy.select.backward_table import BACKWARD_KERNELS
from flashcore_cupy.select.units import round_up

REPEATS = 50
BATCH, HEADS, HEADS_KV, SEQLEN = 2, 8, 4, 1500
#: Each byte of what freed memory is left with, or None: any. 255 makes NaN, and counters of -1.
DIRT = (255, 0, None, 127)


@pytest.fixture
def elsewhere() -> Iterator[Callable[[int], None]]:
    """Enqueue so many calls on another stream, which compete for multiprocessors and the L2."""
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        q, k, v = (cupy.asarray(random(1, 4, 2000, 64, dtype="f2", seed=n)) for n in range(3))
        busy = plan(q, k, v)
        busy.launch()
    stream.synchronize()

    def enqueue(count: int) -> None:
        with stream:
            for _ in range(count):
                busy.launch()

    yield enqueue
    stream.synchronize()


def leave_dirt(sizes: list[int], byte: int | None) -> None:
    """Have the pool's free blocks of these sizes hold what nobody wants to read."""
    import cupy

    blocks: list[Any] = []
    for size in sizes * 2:
        block = cupy.empty(size, np.uint8)
        if byte is None:
            numbers = cupy.arange(size, dtype=np.uint32) * np.uint32(2654435761)
            block[...] = (numbers >> np.uint32(24)).astype(np.uint8)
        else:
            block[...] = byte
        blocks.append(block)
    del block
    blocks.clear()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("kernel", BACKWARD_KERNELS)
def test_bits_do_not_depend_on_memory_or_neighbours(
    kernel: str, head_dim: int, causal: bool, elsewhere: Callable[[int], None]
) -> None:
    import cupy

    if kernel != "bwd_sm80" and compiler.device_arch() != HOPPER:
        pytest.skip(f"{kernel} is for another GPU")
    shapes = ((BATCH, h, SEQLEN, head_dim) for h in (HEADS, HEADS_KV, HEADS_KV, HEADS))
    q, k, v, do = (
        cupy.asarray(random(*shape, dtype=ml_dtypes.bfloat16, seed=n))
        for n, shape in enumerate(shapes)
    )
    rules: dict[str, Any] = {"causal": causal}
    o, lse = attention(q, k, v, return_lse=True, **rules)
    given = do, q, k, v, o, lse
    rules |= {"kernel": kernel}
    bound = plan_backward(*given, **rules)
    inputs = {"dout", *(name for name in "qkvo"), "lse"}
    sizes = [x.nbytes for name, x in bound.arrays.items() if name not in inputs and x.nbytes]
    assert len(sizes) >= 5 and bound.problem.deterministic
    scratch = bound.selection.scratch(bound.problem.attention).values()
    # A call that is remembered has all of it in one array.
    sizes.append(4 * sum(round_up(math.prod(shape), MAX_ALIGN) for shape in scratch))
    if kernel != "bwd_sm80":
        assert bound.arrays["turns"].size > math.ceil(SEQLEN / 64) and "dq_sum" in bound.arrays
    del bound
    expected = None
    for n in range(REPEATS):
        leave_dirt(sizes, DIRT[n % len(DIRT)])
        elsewhere(n % 7)
        got = attention_backward(*given, **rules)[:3]
        found = [x.get().tobytes() for x in got]
        assert all(np.isfinite(x.get().astype(np.float32)).all() for x in got)
        expected = expected or found
        for name, x, y in zip(("dq", "dk", "dv"), found, expected, strict=True):
            assert x == y, f"call {n} gives another {name}"
        del got


def test_dirt_is_what_the_next_array_holds() -> None:
    """Else the test above would prove nothing."""
    import cupy

    pool = cupy.get_default_memory_pool()
    cupy.cuda.Device().synchronize()
    pool.free_all_blocks()
    sizes = [123456, 7890]
    leave_dirt(sizes, 255)
    for size in sizes:
        assert (cupy.empty(size, np.uint8).get() == 255).all()
