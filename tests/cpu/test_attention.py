"""The public function: the correctness matrix, its arguments, and what it says about bad ones."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from helpers import three_arrays

import flashcore_cupy
from flashcore_cupy.check.selftest import cases
from flashcore_cupy.cpu import reference
from flashcore_cupy.cuda import targets
from flashcore_cupy.launch import bind
from flashcore_cupy.problem import request
from flashcore_cupy.problem import rules as rules_module
from flashcore_cupy.problem.attention_problem import GATES, LAYOUTS, contiguous_problem
from flashcore_cupy.problem.request import Request
from flashcore_cupy.select import registry, selector, table

attention = flashcore_cupy.attention


def test_matrix_covers_the_table() -> None:
    every = cases.cases()
    for row in table.ROWS:
        tried = [c for c in every if (c.kernel, c.head_dim) == (row.kernel, row.head_dim)]
        assert {c.dtype for c in tried} >= set(row.dtypes), row
    for kernel in registry.KERNELS:
        mine = [c for c in every if c.kernel == kernel]
        assert {c.gate for c in mine} == set(GATES)
        assert {c.causal for c in mine} == {False, True, "top-left"}
        assert {c.layout for c in mine} == set(LAYOUTS)
        assert {c.kind for c in mine} == set(reference.INPUT_KINDS)


BAD_ARGUMENTS = {
    "list for q": (lambda q, k, v: ((q.tolist(), k, v), {}), TypeError, "q: got list"),
    "three dimensions": (lambda q, k, v: ((q[0], k, v), {}), ValueError, "q: got 3 dimensions"),
    "float64": (
        lambda q, k, v: ([x.astype(np.float64) for x in (q, k, v)], {}),
        TypeError,
        "q: got dtype float64",
    ),
    "integers": (lambda q, k, v: ((q, k.astype(int), v), {}), TypeError, "k: got dtype int64"),
    "mixed dtypes": (
        lambda q, k, v: ((q, k, v.astype(np.float32)), {}),
        TypeError,
        "v: got dtype float32, but q is float16",
    ),
    "other batch": (lambda q, k, v: ((q, k[:0], v[:0]), {}), ValueError, "k: got batch 0"),
    "other length of v": (lambda q, k, v: ((q, k, v[:, :, 1:]), {}), ValueError, "v: got"),
    "other head dim": (lambda q, k, v: ((q, k[..., 1:], v), {}), ValueError, "k: got head dim 15"),
    "heads": (
        lambda q, k, v: ((np.concatenate([q, q[:, :1]], 1), k, v), {}),
        ValueError,
        "k: got 2 heads for q's 3",
    ),
    "no heads": (lambda q, k, v: ((q, k[:, :0], v[:, :0]), {}), ValueError, "heads"),
    "head dim too large": (
        lambda q, k, v: ([np.zeros((1, 1, 2, 513), q.dtype)] * 3, {}),
        ValueError,
        "q: got head dim 513; kernels take 1 to 512",
    ),
    "head dim 0": (lambda q, k, v: ((q[..., :0], k[..., :0], v), {}), ValueError, "head dim 0"),
    "NaN scale": (
        lambda q, k, v: ((q, k, v), {"softmax_scale": math.nan}),
        ValueError,
        "softmax_scale: got nan",
    ),
    "infinite scale": (
        lambda q, k, v: ((q, k, v), {"softmax_scale": math.inf}),
        ValueError,
        "softmax_scale: got inf",
    ),
    "scale as text": (
        lambda q, k, v: ((q, k, v), {"softmax_scale": "1"}),
        TypeError,
        "softmax_scale: got str",
    ),
    "causal": (lambda q, k, v: ((q, k, v), {"causal": "bottom"}), ValueError, "causal: got"),
    "layout": (lambda q, k, v: ((q, k, v), {"layout": "sbhd"}), ValueError, "layout: got 'sbhd'"),
    "gate": (lambda q, k, v: ((q, k, v), {"gate": "pq"}), ValueError, "gate: got 'pq'"),
    "kernel": (lambda q, k, v: ((q, k, v), {"kernel": "best"}), ValueError, "kernel: got 'best'"),
    "tile for NumPy": (
        lambda q, k, v: ((q, k, v), {"config": {"block_n": 32}}),
        ValueError,
        "config: changes a kernel's tile",
    ),
    "LSE of a gate": (
        lambda q, k, v: ((q, k, v), {"gate": "qk", "return_lse": True}),
        ValueError,
        "return_lse: gate 'qk' stops before",
    ),
    "shape of out": (
        lambda q, k, v: ((q, k, v), {"out": np.empty((1, 2, 8, 15), q.dtype)}),
        ValueError,
        "out: got shape (1, 2, 8, 15)",
    ),
    "dtype of out": (
        lambda q, k, v: ((q, k, v), {"out": np.empty(q.shape, np.float32)}),
        TypeError,
        "out: got dtype float32",
    ),
    "out is an input": (lambda q, k, v: ((q, k, v), {"out": k}), ValueError, "out: overlaps k"),
    "out is a broadcast": (
        lambda q, k, v: (
            (q, k, v),
            {"out": np.lib.stride_tricks.as_strided(np.zeros(64, q.dtype), q.shape, (0, 32, 4, 2))},
        ),
        ValueError,
        "out: its elements share memory",
    ),
    "out with a gate": (
        lambda q, k, v: ((q, k, v), {"gate": "softmax", "out": np.empty_like(q)}),
        ValueError,
        "out: gate 'softmax' stops before",
    ),
    "read-only out": (
        lambda q, k, v: ((q, k, v), {"out": np.frombuffer(bytes(512), q.dtype).reshape(q.shape)}),
        ValueError,
        "out: is read-only",
    ),
    "huge scale": (
        lambda q, k, v: ((q, k, v), {"softmax_scale": 10**400}),
        ValueError,
        "softmax_scale: got 1",
    ),
    "scale in a list": (
        lambda q, k, v: ((q, k, v), {"softmax_scale": [1.0]}),
        TypeError,
        "softmax_scale: got list",
    ),
    "causal in an array": (
        lambda q, k, v: ((q, k, v), {"causal": np.ones(2, bool)}),
        ValueError,
        "causal: got",
    ),
    "gate in a list": (lambda q, k, v: ((q, k, v), {"gate": ["qk"]}), ValueError, "gate: got"),
    "kernel in a list": (lambda q, k, v: ((q, k, v), {"kernel": []}), ValueError, "kernel: got"),
    "out is a list": (lambda q, k, v: ((q, k, v), {"out": []}), TypeError, "out: got list"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_are_named(name: str) -> None:
    change, kind, message = BAD_ARGUMENTS[name]
    args, rules = change(*three_arrays())
    with pytest.raises(kind) as caught:
        attention(*args, **rules)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_public_names() -> None:
    assert callable(flashcore_cupy.attention)
    assert set(flashcore_cupy.KERNELS) == set(registry.KERNELS)
    assert flashcore_cupy.__version__.count(".") == 2


def test_explain_on_numpy() -> None:
    assert "CPU" in flashcore_cupy.explain(*three_arrays())


class _OnGpu(np.ndarray):
    """NumPy's array, as far as what ``explain`` looks at."""

    device = SimpleNamespace(id=0)


def _explained(monkeypatch: pytest.MonkeyPatch, arch: str, *operands: Any, **choices: Any) -> str:
    monkeypatch.setattr(bind.compiler, "device_arch", lambda device: arch)
    monkeypatch.setattr(request, "rule_array", lambda name, x, cpu: x)
    q, k, v = (x.view(_OnGpu) for x in operands)
    return bind.explain(Request.of(choices).call(q, k, v, None, on_gpu=True))


def test_explain_on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.empty((2, 16, 2048, 128), ml_dtypes.bfloat16)
    wide = np.empty((2, 16, 2048, 132), ml_dtypes.bfloat16)[..., :128]
    tiny = x[:1, :2, :100]
    taken = "wgmma_sm90 on sm_90a: 128x128 tile, 2 consumer warpgroups, 2 stages, TMA, head dim 128"
    text = _explained(monkeypatch, "sm_90a", x, x, x, causal=True)
    assert text.startswith(taken) and "\n" not in text
    bias = np.zeros((2048, 2048), x.dtype)
    text = _explained(monkeypatch, "sm_90a", x, x, x, bias=bias)
    assert text.startswith(f"{taken}, bias, ") and "\n" not in text
    text = _explained(monkeypatch, "sm_90a", x, x, x, mask=bias == 0)
    assert text.startswith(f"{taken}, mask, mask_chunks, ") and "\n" not in text
    text = _explained(monkeypatch, "sm_90a", x[:, :, :1], x, x)
    assert text.startswith("wgmma_sm90 on sm_90a: ") and "pack_gqa, split_kv, TMA" in text
    text = _explained(monkeypatch, "sm_90a", tiny, tiny, tiny)
    assert text.startswith(
        "cluster_sm90 on sm_90a: 64x128 tile, 1 warpgroup along the keys, one_tile, alone, TMA"
    )
    few = x[:1, :2, :, :][:, :, :16]
    first, second = _explained(monkeypatch, "sm_90a", few, few, few).splitlines()
    assert first.startswith("mma_sm80 on sm_90a: ")
    assert second == "passed over wgmma_sm90: is for larger grids"
    for operands, rules, reason in (
        ((x, wide, wide), {}, "loads by TMA: .* multiples of 16 bytes, .* unlike those of k, v"),
        ((x.astype(np.float32),) * 3, {}, "takes float16 and bfloat16, not float32"),
        ((x, x, x), {"bias": bias[:, :1]}, "is slower with a bias that cannot be read two keys.*"),
        ((x, x, x), {"mask": bias[:, :1] == 0}, "reads a mask 16 keys at a time: .*"),
    ):
        first, second = _explained(monkeypatch, "sm_90a", *operands, **rules).splitlines()
        assert first.startswith("mma_sm80 on sm_90a: ")
        assert re.fullmatch(f"passed over wgmma_sm90: {reason}", second)
    turned = np.empty((2, 16, 128, 2048), x.dtype).swapaxes(2, 3)
    first, second = _explained(monkeypatch, "sm_90a", turned, x, x).splitlines()
    assert first.startswith(taken) and second.startswith("copied q: its last axis is not contig")
    text = _explained(monkeypatch, "sm_120", x, x, x)
    why = "passed over wgmma_sm90: needs wgmma, which sm_90a alone has; the target is sm_120"
    assert text.startswith("mma_sm80 on sm_120: ") and text.endswith(why)
    with pytest.raises(ValueError, match=r"kernel 'wgmma_sm90': loads by TMA: .* those of q"):
        _explained(monkeypatch, "sm_90a", wide, x, x, kernel="wgmma_sm90")


def test_config_defines_are_complete() -> None:
    """config.cuh refuses to compile without any of its defines, so none can be forgotten."""
    row = selector.rows_of("wmma_fused_64")[0]
    config = selector.configure_row(row, contiguous_problem(1, 1, 1, row.head_dim))
    assert all(name.startswith("FC_") for name in config.defines())
    assert config.defines()["FC_SMEM_BYTES"] == config.smem_bytes


ILLEGAL_TILES = [
    ("scalar", {"block_n": 64}, "block_n=32"),
    ("scalar", {"block_m": 10}, "not a multiple of the 4 warps"),
    ("scalar", {"cp_async": True}, "scalar has one stage"),
    ("wmma_unfused", {"num_stages": 1}, "num_stages=2"),
    ("wmma_fused_32", {"block_n": 0}, "block_n=0 is not positive"),
    ("wmma_fused_64", {"block_n": 40}, "block_n=40 is not a multiple of 16 x warps_n"),
    ("wmma_fused_64", {"warps_m": 8, "warps_n": 8}, "at most 32"),
    ("wmma_fused_64", {"warps_m": 4, "warps_n": 3}, "is not a multiple"),
    ("wmma_fused_64", {"num_stages": 3}, "num_stages=3"),
    ("wmma_cp_async", {"fp8": True}, "fp8 goes with warp_softmax"),
    ("wmma_warp_softmax", {"warps_m": 2}, "a warp owns 16 whole rows"),
    ("wmma_warp_softmax", {"block_n": 16}, "block_m <= num_stages * block_n"),
    ("fp8_wmma", {"cp_async": True}, "cp_async=False"),
    ("fp8_wmma", {"fp8": False}, "fp8 goes with fp8_wmma, and that with fp8"),
    ("wmma_warp_softmax", {"fp8": True, "cp_async": False}, "fp8 goes with fp8_wmma"),
    ("scalar", {"pack_gqa": True}, "no kernel of the ladder has warps_d, pack_gqa or split_kv"),
    ("wmma_fused_64", {"warps_d": 2}, "no kernel of the ladder has warps_d, pack_gqa or split_kv"),
    ("mma_sm80", {"num_stages": 3}, "num_stages=3"),
    ("mma_sm80", {"cp_async": False}, "mma_sm80 has cp_async"),
    ("mma_sm80", {"warp_softmax": True}, "neither warp_softmax nor fp8"),
    ("mma_sm80", {"block_m": 40}, "not a multiple of 16 x warps_m"),
    ("mma_sm80", {"warps_d": 3, "num_stages": 1}, "do not divide into steps of 16"),
    ("mma_sm80", {"warps_d": 2, "split_kv": True}, "neither warps_n nor split_kv"),
    ("mma_sm80", {"warps_d": 0}, "warps_d=0 is not positive"),
    ("mma_sm80", {"warps_m": 4, "warps_n": 4, "warps_d": 4}, "at most 32"),
]


@pytest.mark.parametrize(("kernel", "changes", "message"), ILLEGAL_TILES)
def test_illegal_tiles_say_why(kernel: str, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match="config: ") as caught:
        selector.select(
            contiguous_problem(1, 8, 512, 64), "sm_90a", kernel=kernel, overrides=changes
        )
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"warps_d": 4}, "each warp needs whole panels of 64 of the 128 columns"),
        ({"block_n": 96, "warps_d": 2}, "a warp's 48 keys are neither whole panels of 32"),
        ({"block_m": 256, "warps_m": 16, "warps_d": 2}, "at most 15 where warps share rows"),
    ],
)
def test_warps_that_share_rows_say_why_not(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        selector.select(
            contiguous_problem(8, 16, 2048, 128),
            "sm_90a",
            kernel="mma_sm80",
            overrides={"num_stages": 1, **changes},
        )


@pytest.mark.parametrize(
    "kernel", [k for k in registry.KERNELS if not registry.KERNELS[k].has_rules]
)
def test_kernels_without_rules_say_so(kernel: str) -> None:
    plain = contiguous_problem(1, 2, 64, 64)
    rules = rules_module.describe_rules(
        rules_module.ScoreShape(1, 2, 64, 64),
        "float16",
        window=(3, -1),
        softcap=2.0,
        mask_mod="true",
    )
    for wanted, missing in (
        (replace(plain, rules=rules), "softcap, mask_mod, window"),
        (replace(plain, sequences=1), "cu_seqlens"),
    ):
        with pytest.raises(ValueError, match=f"kernel '{kernel}': has no {missing}"):
            selector.select(wanted, "sm_90a", kernel=kernel)
        assert selector.select(wanted, "sm_90a").kernel.has_rules
        with pytest.raises(ValueError, match="none can do this problem on sm_75"):
            selector.select(wanted, "sm_75")


def test_float32_has_rows_of_its_own() -> None:
    for head_dim in (32, 64, 100, 256, 512):
        for dtype in ("float32", "float16"):
            wanted = contiguous_problem(1, 2, 200, head_dim, dtype=dtype)
            try:
                found = selector.select(wanted, "sm_90a", kernel="mma_sm80")
            except ValueError as error:
                assert f"in {dtype}, not {head_dim}" in str(error)
                continue
            rows = [row for row in selector.rows_of("mma_sm80") if dtype in row.dtypes]
            assert found.config.tile in {row.tile for row in rows}
    wanted = contiguous_problem(1, 2, 200, 64, dtype="float32")
    with pytest.raises(ValueError, match="wmma_fused_64': takes float16 and bfloat16, not float32"):
        selector.select(wanted, "sm_90a", kernel="wmma_fused_64")


def test_an_override_is_judged_by_the_row_that_fits() -> None:
    """Head dim 128 has a second, smaller row; this tile is illegal there, right in the first."""
    wanted = contiguous_problem(1, 8, 512, 128)
    changes = {"block_m": 128, "warps_m": 8}
    found = selector.select(wanted, "sm_90a", kernel="wmma_warp_softmax", overrides=changes)
    assert (found.config.tile.block_m, found.config.tile.block_n) == (128, 64)


@pytest.mark.parametrize(
    ("kernel", "arch", "changes", "reason"),
    [
        ("wmma_fused_64", "sm_75", {}, "needs bfloat16 conversions, hence sm_80 or later"),
        ("mma_sm80", "sm_75", {}, "needs cp.async, hence sm_80 or later; the target is sm_75"),
        (
            "wmma_cp_async",
            "sm_90a",
            {"block_m": 256, "warps_m": 16},
            "bytes of shared memory at head dim 128, sm_90a has 232448",
        ),
    ],
)
def test_what_a_target_lacks_is_named(kernel: str, arch: str, changes: dict, reason: str) -> None:
    wanted = contiguous_problem(1, 8, 512, 128, dtype="bfloat16")
    with pytest.raises(ValueError, match=f"kernel '{kernel}': ") as caught:
        selector.select(wanted, arch, kernel=kernel, overrides=changes)
    assert reason in str(caught.value)


def test_targets() -> None:
    assert [targets.target_of(n) for n in (75, 86, 90)] == ["sm_75", "sm_86", "sm_90a"]
    assert [targets.capability(arch) for arch in ("sm_75", "sm_90a", "sm_120f")] == [75, 90, 120]
    assert targets.smem_limit("sm_90") == targets.smem_limit("sm_90a") == 227 * 1024
    assert targets.smem_limit("sm_999") == 48 * 1024, "what every GPU has"
    with pytest.raises(ValueError, match="arch: got 'gpu'; use a target such as 'sm_90a'"):
        targets.capability("gpu")


def test_auto_does_not_shop_around_for_an_override() -> None:
    """The fastest kernel refuses it, though a slower one would take it."""
    wanted = contiguous_problem(4, 8, 2048, 64)
    change = {"warps_n": 2}
    with pytest.raises(ValueError, match="kernel 'wgmma_sm90': config: wgmma_sm90 has no warps_n"):
        selector.select(wanted, "sm_90a", overrides=change)
    assert selector.select(wanted, "sm_90a", kernel="mma_sm80", overrides=change)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_numpy_and_layouts_agree(dtype: object) -> None:
    q, k, v = three_arrays(dtype, (2, 4, 33, 16))
    o, lse = attention(q, k[:, :2], v[:, :2], causal=True, return_lse=True)
    turned = [np.ascontiguousarray(x.swapaxes(1, 2)) for x in (q, k[:, :2], v[:, :2])]
    other, other_lse = attention(*turned, causal=True, return_lse=True, layout="bshd")
    assert o.dtype == dtype and lse.dtype == np.float32 and lse.shape == (2, 4, 33)
    np.testing.assert_array_equal(o, other.swapaxes(1, 2))
    np.testing.assert_array_equal(lse, other_lse)
