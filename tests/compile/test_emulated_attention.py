"""``attention`` on NumPy arrays by a kernel that is named: the kernel itself, emulated."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import flashcore_cupy
from flashcore_cupy import attention
from flashcore_cupy.attention import plan
from flashcore_cupy.cpu.emulator import run
from flashcore_cupy.cpu.emulator.build import cxx
from flashcore_cupy.cpu.emulator.run import Schedule
from flashcore_cupy.jit import CompileError

pytestmark = pytest.mark.skipif(cxx() is None, reason="needs a C++ compiler: there is none")

B, HQ, HKV, SQ, SKV, D = 2, 4, 2, 40, 70, 32
KERNEL = "mma_sm80"
Array = np.ndarray[Any, Any]


def operands(seed: int = 0, sq: int = SQ, skv: int = SKV, batch: int = B) -> list[Array]:
    rng = np.random.default_rng(seed)
    shapes = ((batch, HQ, sq, D), (batch, HKV, skv, D), (batch, HKV, skv, D))
    return [rng.standard_normal(shape).astype(np.float16) for shape in shapes]


def assert_close(got: Any, expected: Any, error: float = 2e-3) -> None:
    for x, y in zip(got, expected, strict=True):
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        np.testing.assert_allclose(x, y, rtol=0, atol=error)


def both(*arrays: Array, kernel: str = KERNEL, **arguments: Any) -> list[Any]:
    """Results of a kernel, after they were compared with NumPy's."""
    got = attention(*arrays, kernel=kernel, return_lse=True, **arguments)
    assert_close(got, attention(*arrays, return_lse=True, **arguments))
    return list(got)


def test_a_named_kernel_runs_on_numpy_arrays() -> None:
    q, k, v = operands()
    o, lse = both(q, k, v, causal=True)
    assert type(o) is type(lse) is np.ndarray and o.dtype == q.dtype and lse.shape == (B, HQ, SQ)
    text = flashcore_cupy.explain(q, k, v, causal=True, kernel=KERNEL)
    assert text.startswith(f"{KERNEL} on sm_90a: ") and "emulated on the CPU" in text


def test_layouts_views_and_out() -> None:
    q, k, v = operands()
    wide = np.full((B, SQ, HQ, D + 8), np.nan, np.float16)
    q_view = wide[..., :D]  # other strides, and NaN beside it
    q_view[...] = q.transpose(0, 2, 1, 3)
    k_view, v_view = (np.asfortranarray(x.transpose(0, 2, 1, 3)) for x in (k, v))  # copied
    big = np.full((B, SQ, HQ, D + 8), np.nan, np.float16)
    out = big[..., :D]
    returned = attention(q_view, k_view, v_view, layout="bshd", causal=True, kernel=KERNEL, out=out)
    assert returned is out and np.isnan(big[..., D:]).all()
    assert_close([out.transpose(0, 2, 1, 3)], [attention(q, k, v, causal=True)])
    note = flashcore_cupy.explain(q_view, k_view, v_view, layout="bshd", kernel=KERNEL)
    assert "copied k: its last axis is not contiguous" in note


def test_sizes_of_nothing() -> None:
    for sq, batch in ((0, B), (SQ, 0)):
        o, lse = both(*operands(sq=sq, batch=batch), causal=True)
        assert o.size == lse.size == 0
    o, lse = both(*operands(skv=0), causal=True)
    assert not o.any() and np.isneginf(lse).all()


def test_every_rule_and_expressions() -> None:
    rng = np.random.default_rng(1)
    table = rng.standard_normal(64).astype(np.float32)
    rules: dict[str, Any] = {
        "causal": "top-left",
        "window": (30, -1),
        "softcap": 4.0,
        "alibi_slopes": [0.1, 0.2, 0.3, 0.4],
        "bias": rng.standard_normal((SQ, SKV)).astype(np.float32)[:, ::-1],
        "mask": rng.random((1, HQ, 1, SKV)) < 0.8,
        "sink": [0.5, -0.5, 1.0, 0.0],
        "mod_args": {"table": table},
    }
    expressions = {"score_mod": "score + table[(q_idx + h) % 64]", "mask_mod": "kv_idx % 5 != b"}
    functions = {
        "score_mod": lambda score, b, h, q_idx, kv_idx, *, table: score + table[(q_idx + h) % 64],
        "mask_mod": lambda b, h, q_idx, kv_idx, *, table: (kv_idx + 0 * q_idx) % 5 != b,
    }
    arrays = operands()
    got = attention(*arrays, kernel=KERNEL, return_lse=True, **rules, **expressions)
    expected = attention(*arrays, return_lse=True, **rules, **functions)
    assert_close(got, expected)


def test_a_mistake_in_an_expression_is_told_by_its_own_line() -> None:
    with pytest.raises(CompileError) as caught:
        attention(*operands(), kernel=KERNEL, score_mod="score +\n lacking")
    assert str(caught.value).startswith("score_mod, line 2: 'lacking': the kernel does not compile")
    assert "-DFC_HEAD_DIM=32" in str(caught.value)


def test_packed_batches() -> None:
    lengths = ((5, 9), (0, 3), (33, 40))
    starts = np.cumsum([(0, 0), *lengths], axis=0)
    rng = np.random.default_rng(2)
    q, k, v = (
        rng.standard_normal((starts[-1][side], heads, D)).astype(np.float16)
        for side, heads in ((0, HQ), (1, HKV), (1, HKV))
    )
    cu = {"cu_seqlens_q": starts[:, 0].tolist(), "cu_seqlens_k": starts[:, 1].tolist()}
    o, lse = both(q, k, v, causal=True, **cu)
    assert o.shape == q.shape and lse.shape == (HQ, len(q))


def test_batch_invariant_bits_and_a_tile_of_ones_own() -> None:
    q, k, v = operands()
    choices: dict[str, Any] = {"kernel": KERNEL, "causal": True, "batch_invariant": True}
    whole = attention(q, k, v, **choices)
    assert attention(q[1:], k[1:], v[1:], **choices).tobytes() == whole[1:].tobytes()
    tile = {"block_m": 64, "block_n": 32, "warps_m": 4, "warps_n": 1}
    both_tiles = attention(q, k, v, **choices, config=tile)
    assert_close([both_tiles], [whole])
    assert "64x32 tile" in flashcore_cupy.explain(q, k, v, **choices, config=tile)


@pytest.mark.parametrize("gate", ["qk", "softmax"])
def test_gates(gate: Any) -> None:
    q, k, v = operands()
    got = attention(q, k, v, causal=True, gate=gate, kernel=KERNEL)
    assert got.dtype == np.float32 and got.shape == (B, HQ, SQ, SKV)
    expected = attention(q, k, v, causal=True, gate=gate)
    hidden = np.isneginf(expected)
    assert (np.isneginf(got) == hidden).all()
    assert_close([np.where(hidden, 0, got)], [np.where(hidden, 0, expected)])


def test_a_plan_runs_in_any_order_to_the_same_bits() -> None:
    q, k, v = operands()
    bound: Any = plan(q, k, v, causal=True, kernel=KERNEL)
    bits = set()
    for seed in range(4):
        bound.arrays["o"].fill(np.nan)
        bound.launch(Schedule.seeded(seed))
        bits.add(bound.arrays["o"].tobytes())
    assert len(bits) == 1
    with pytest.raises(
        TypeError, match="q: a plan is for arrays on a GPU, or for a kernel by name"
    ):
        plan(q, k, v)


def test_tensors_of_torch_come_back_as_such() -> None:
    torch = pytest.importorskip("torch")
    arrays = operands()
    q, k, v = map(torch.from_numpy, arrays)
    o = attention(q, k, v, causal=True, kernel=KERNEL)
    assert isinstance(o, torch.Tensor)
    assert_close([o.numpy()], [attention(*arrays, causal=True)])


def test_threads_at_once() -> None:
    cases = [operands(seed) for seed in range(6)]
    alone = [attention(*case, causal=True, kernel=KERNEL).tobytes() for case in cases]
    with ThreadPoolExecutor(6) as pool:
        made = pool.map(lambda case: attention(*case, causal=True, kernel=KERNEL), cases)
        assert [o.tobytes() for o in made] == alone


def test_all_launches_can_be_stopped() -> None:
    """What holds a pool of threads that emulate has to end them before it waits for them."""
    attention(*operands(), causal=True, kernel=KERNEL)
    with ThreadPoolExecutor(2) as pool:
        long = operands(sq=9000, skv=9000)
        made = [pool.submit(attention, *long, causal=True, kernel=KERNEL) for _ in range(2)]
        while any(not one.done() for one in made):
            run.stop_all()
            time.sleep(0.05)
    for one in made:
        with pytest.raises(run.KernelError, match="stopped"):
            one.result()


def script(text: str) -> list[str]:
    head = (
        "import numpy as np\nfrom flashcore_cupy import attention\n"
        f"def call(s): return attention(*3 * [np.ones((1, {HQ}, s, {D}), np.float16)], "
        f"causal=True, kernel={KERNEL!r})\n"
    )
    return [sys.executable, "-c", head + text]


def test_a_child_of_fork_runs_kernels_too() -> None:
    if not hasattr(os, "fork"):
        pytest.skip("this system has no fork")
    text = "call(40)\nimport os\nif os.fork() == 0: os._exit(int(not (call(40) == 1).all()))\n"
    done = subprocess.run(script(text + "print(os.wait()[1])"), capture_output=True, check=True)
    assert done.stdout == b"0\n"


def test_ctrl_c_ends_an_emulated_run_at_once() -> None:
    """A run of minutes; what it was doing is stopped, and the exception is Python's usual one."""
    # What a shell starts in the background ignores Ctrl-C, and so would what that starts.
    text = (
        "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "call(8)\nprint('begun', flush=True)\ncall(30000)\n"
    )
    with subprocess.Popen(script(text), stdout=-1, stderr=-1, text=True) as started:
        assert started.stdout is not None and started.stdout.readline() == "begun\n"
        time.sleep(1.0)
        began = time.monotonic()
        started.send_signal(signal.SIGINT)
        _, told = started.communicate(timeout=60)
        assert time.monotonic() - began < 40  # a second or so, on a machine that is not busy
    assert told.rstrip().endswith("KeyboardInterrupt") and started.returncode != 0
