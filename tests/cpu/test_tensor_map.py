"""Tensor maps: what the driver is asked for, and which problems the kernel that needs them takes.

The driver is a stand-in: none of this needs a GPU.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from cases_launch import HOPPER, KERNEL, array_at, config_of, fixed, moved, output_of, ruled, views
from cases_reference import repeatable
from helpers import ROOT
from hypothesis import given
from hypothesis import strategies as st

from flashcore_cupy.launch import launch_cache, tensor_map
from flashcore_cupy.launch.parameter_block import ParameterBlock
from flashcore_cupy.launch.plan import Step
from flashcore_cupy.problem.array_spec import spec_of
from flashcore_cupy.problem.attention_problem import (
    AttentionProblem,
    contiguous_problem,
    describe,
)
from flashcore_cupy.problem.rules import NO_RULES
from flashcore_cupy.select import params, registry, selector
from flashcore_cupy.select.config import KernelConfig

SMEM_LIMIT = 227 * 1024


@pytest.fixture(autouse=True)
def nothing_is_kept() -> Any:
    yield
    tensor_map.encode.cache_clear()


# --- what a map says ------------------------------------------------------------------------------


def test_maps_of_contiguous_arrays() -> None:
    problem = contiguous_problem(
        3, 8, 300, 192, heads_kv=2, seqlen_kv=500, head_dim_v=128, dtype="bfloat16"
    )
    block_n = config_of(problem).tile.block_n
    found = views(problem)
    assert found["q"] == (
        *("q", "bfloat16", (192, 300, 8, 3)),
        *((384, 384 * 300, 384 * 300 * 8), (64, 64, 1), 0),
    )
    assert found["k"] == (
        *("k", "bfloat16", (192, 500, 2, 3)),
        *((384, 384 * 500, 384 * 500 * 2), (64, block_n, 1), 0),
    )
    assert found["v"] == (
        *("v", "bfloat16", (128, 500, 2, 3)),
        *((256, 256 * 500, 256 * 500 * 2), (64, block_n, 1), 0),
    )
    assert found["o"] == (
        *("o", "bfloat16", (128, 300, 8, 3)),
        *((256, 256 * 300, 256 * 300 * 8), (64, 16, 1), 0),
    )
    assert {view.swizzle for view in found.values()} == {128}


@pytest.mark.parametrize("group", [1, 2, 4, 8, 16])
def test_packed_groups_have_heads_before_rows(group: int) -> None:
    """A copy's rows are then query * group + head of the group."""
    problem = contiguous_problem(3, 2 * group, max(1, 16 // group), 64, heads_kv=2, seqlen_kv=500)
    chosen = config_of(problem)
    assert chosen.tile.pack_gqa and chosen.tile.split_kv
    view, rows = views(problem)["q"], problem.seqlen_q
    assert view.dims == (64, 2 * group, rows, 3) and view.box == (64, group, 64 // group)
    assert view.strides == (128 * rows, 128, 128 * rows * 2 * group)
    assert views(problem)["k"].box == (64, chosen.tile.block_n, 1)


@pytest.mark.parametrize("group", [3, 5, 7, 12])
def test_groups_that_do_not_fill_a_copy_are_not_packed(group: int) -> None:
    problem = contiguous_problem(3, 2 * group, 1, 64, heads_kv=2, seqlen_kv=500)
    assert refusal(problem, auto=True) == f"packs groups of 1, 2, 4, ... 64 heads, not of {group}"
    assert not config_of(problem).tile.pack_gqa, "by name it is taken"


def test_heads_that_see_different_keys_are_not_packed() -> None:
    """Not even if asked to: a key that one of them does not see must not reach it."""
    problem = contiguous_problem(2, 8, 300, 64, heads_kv=2)
    problem = ruled(problem, mask_mod="h % 4 != 0 || kv_idx < 10")
    tile = {"block_m": 64, "warps_m": 4, "pack_gqa": True}
    with pytest.raises(ValueError, match="hides or drops keys of some heads of a group"):
        config_of(problem, **tile)
    assert config_of(replace(problem, rules=NO_RULES), **tile).tile.pack_gqa


@pytest.mark.parametrize(("dim", "box"), [(64, 64), (72, 32), (96, 32), (104, 64), (256, 64)])
def test_boxes_are_as_wide_as_divides_the_tile(dim: int, box: int) -> None:
    problem = contiguous_problem(1, 8, 300, dim)
    for view in views(problem).values():
        assert view.dims[0] == dim, "columns beyond are zeros"
        assert view.box[0] == box and view.swizzle == 2 * box
    assert config_of(problem).head_dim % box == 0


def test_strides_are_those_of_the_view() -> None:
    base = np.empty((2, 400, 3, 8, 64), np.float16)  # batch, row, one of q k v, head, column
    q, k, v = (base[:, :, i] for i in range(3))
    problem = describe(q, k, v, layout="bshd", addresses=(0, 2**20, 2**21))
    for view in [views(problem)[name] for name in "qkv"]:
        assert view.dims == (64, 400, 8, 2)
        assert view.strides == (3 * 8 * 128, 128, 400 * 3 * 8 * 128)


def test_strides_that_lead_nowhere_are_legal() -> None:
    base = np.empty((1, 1, 1, 72), np.float16)
    found = views(describe(*[base[..., :40]] * 3, addresses=(16, 32, 48)))
    for view in found.values():
        assert view.dims == (40, 1, 1, 1)
        assert all(step > 0 and step % 16 == 0 for step in view.strides)


def test_keys_end_behind_the_last_that_is_seen() -> None:
    top_left = contiguous_problem(1, 8, 70, 64, seqlen_kv=200, causal="top-left")
    found = views(top_left)
    assert found["k"].dims[1] == found["v"].dims[1] == 70
    assert found["k"].strides[1] == 200 * 128, "which leaves the strides as they are"
    found = views(ruled(top_left, window=(5, -1)))
    assert found["v"].dims[1] == 70 and found["v"].offset == 0


def test_values_begin_at_the_first_that_is_seen() -> None:
    problem = contiguous_problem(2, 8, 70, 64, seqlen_kv=500, causal=True)
    found = views(ruled(problem, window=(100, -1)))
    assert found["v"].offset == 330 * 128 and found["v"].dims[1] == 170
    assert found["k"].offset == 0 and found["k"].dims[1] == 500
    assert found["q"].offset == 0
    assert views(ruled(problem, window=(1000, -1)))["v"].offset == 0


@repeatable
@given(
    *(st.integers(1, 12), st.integers(0, 12), st.sampled_from((False, True, "top-left"))),
    *(st.integers(-1, 14), st.integers(-1, 14)),
)
def test_rows_of_v_are_those_that_are_seen(
    seqlen_q: int, seqlen_kv: int, causal: Any, left: int, right: int
) -> None:
    problem = contiguous_problem(2, 3, seqlen_q, 64, seqlen_kv=seqlen_kv, causal=causal)
    problem = ruled(problem, window=(left, right))
    i, j = np.arange(seqlen_q)[:, None] + problem.causal_offset, np.arange(seqlen_kv)[None, :]
    visible = ((j >= i - left) | (left < 0)) & ((j <= i + right) | (right < 0))
    seen = np.flatnonzero((visible & ((j <= i) | (causal is False))).any(0))
    view = views(problem)["v"]
    first, rows = view.offset // 128, view.dims[1]
    assert rows >= 1 and first + rows <= max(1, seqlen_kv)
    if seen.size:
        assert first <= seen[0] and seen[-1] < first + rows
    if seen.size and visible.any(1).all():
        assert (first, rows) == (seen[0], seen[-1] + 1 - seen[0])


def test_boxes_of_packed_batches_end_where_their_sequence_does() -> None:
    """Batch b of a map are as many rows of the array as a box has, o's those before row b."""
    q, k = np.empty((500, 8, 64), np.float16), np.empty((900, 2, 64), np.float16)
    problem = describe(q, k, k, sequences=7, causal=True)
    found = views(ruled(problem, window=(3, -1)))
    for name, total, heads in (("q", 500, 8), ("k", 900, 2), ("v", 900, 2), ("o", 500, 8)):
        view, row = found[name], heads * 128
        rows = view.box[1]
        stored = name == "o"
        assert view.dims == (64, rows, heads, total + stored)
        assert view.strides == (row, 128, row)
        assert view.offset == (-rows * row if stored else 0), "TMA loads by a mapped address"
    assert found["o"].box[1] == 16


def test_a_packed_batch_of_one_row_may_have_any_stride() -> None:
    q = np.empty((2, 8, 64), np.float16)[::-1][:1]  # a stride that would lead backwards
    found = views(describe(q, q, q, sequences=1))
    for name in "kv":
        assert found[name].strides == (128, 128, 128)
        assert found[name].dims == (64, 1, 8, 1), "no row that is not there"


@pytest.mark.parametrize(("total", "box"), [(100, 16), (10, 16), (1, 16), (300, 128)])
def test_the_header_places_boxes_as_the_maps_have_them(total: int, box: int) -> None:
    text = " ".join((ROOT / "kernels" / "flashcore" / "tile" / "tma_tile.cuh").read_text().split())
    for line in (
        "first = row + r - map_begin, inside = min(end - (row + r), map_rows);",
        "const int skipped = min(map_rows - inside, first);",
        "return {skipped, first - skipped};",
    ):
        assert line in text
    for map_begin in (0, -box):  # of what is loaded, and of what is stored
        map_rows, batches = (box, total + 1) if map_begin else (min(box, total), total)
        for row in range(total):
            for end in range(max(row - 2 * box, 0), total + 1):
                first, inside = row - map_begin, min(end - row, map_rows)
                skipped = min(map_rows - inside, first)
                batch = first - skipped
                # What the box has inside of the map, as rows of the array by their place in it.
                there = range(skipped, min(skipped + box, map_rows)) if batch < batches else ()
                reached = [map_begin + batch + r for r in there]
                assert batch >= 0
                wanted = list(range(row, min(row + box, end)))
                assert reached[: len(wanted)] == wanted
                if map_begin or end >= map_rows:
                    assert reached == wanted, "no row behind the sequence"
                assert all(0 <= r < total for r in reached)


def test_a_map_has_a_row_though_nothing_is_there() -> None:
    for seqlen_q, seqlen_kv, causal in ((5, 0, False), (5, 7, True)):
        problem = contiguous_problem(1, 2, seqlen_q, 64, seqlen_kv=seqlen_kv, causal=causal)
        for view in views(ruled(problem, window=(-1, -1))).values():
            assert min(view.dims) >= 1 and min(view.strides) >= 16
    # The last query stands before the first key.
    hidden = contiguous_problem(1, 2, 5, 64, seqlen_kv=7, causal="top-left")
    hidden = replace(hidden, rules=replace(hidden.rules, window=(-1, -6)))
    assert views(hidden)["v"].dims[1] >= 1


# --- the driver -----------------------------------------------------------------------------------


class Driver(ModuleType):
    """``cuda.bindings.driver``, as far as maps take it: a map is the address, and zeros."""

    CUtensorMapDataType = SimpleNamespace(
        CU_TENSOR_MAP_DATA_TYPE_FLOAT16="f16", CU_TENSOR_MAP_DATA_TYPE_BFLOAT16="bf16"
    )
    CUtensorMapInterleave = SimpleNamespace(CU_TENSOR_MAP_INTERLEAVE_NONE="none")
    CUtensorMapSwizzle = SimpleNamespace(
        CU_TENSOR_MAP_SWIZZLE_64B=64, CU_TENSOR_MAP_SWIZZLE_128B=128
    )
    CUtensorMapL2promotion = SimpleNamespace(CU_TENSOR_MAP_L2_PROMOTION_L2_128B=128)
    CUtensorMapFloatOOBfill = SimpleNamespace(CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE="zeros")
    CUresult = SimpleNamespace(CUDA_SUCCESS=0)
    cuuint64_t = cuuint32_t = int

    def __init__(self) -> None:
        super().__init__("driver")
        self.calls: list[tuple[Any, ...]] = []
        self.kept: list[Any] = []
        self.result = 0

    def cuTensorMapEncodeTiled(self, *arguments: Any) -> tuple[int, Any]:
        self.calls.append(arguments)
        encoded = (ctypes.c_uint64 * 16)(arguments[2])
        self.kept.append(encoded)
        return self.result, SimpleNamespace(getPtr=lambda: ctypes.addressof(encoded))


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    fake = Driver()
    monkeypatch.setattr(tensor_map, "binding", lambda: fake)
    tensor_map.encode.cache_clear()
    return fake


def test_what_the_driver_is_asked_for(driver: Driver) -> None:
    problem = contiguous_problem(2, 8, 70, 96, seqlen_kv=500, causal=True, dtype="bfloat16")
    problem = ruled(problem, window=(100, -1))
    view = views(problem)["v"]
    words = tensor_map.encode(2**32, view)
    (call,) = driver.calls
    assert call == (
        *("bf16", 4, 2**32 + 330 * 192, [96, 170, 8, 2], [192, 192 * 500, 192 * 500 * 8]),
        *([32, view.box[1], 1, 1], [1, 1, 1, 1], "none", 64, 128, "zeros"),
    )
    assert words.dtype == np.uint64 and words.shape == (16,) and words[0] == call[2]
    assert not words.flags.writeable
    tensor_map.encode(2**32, views(contiguous_problem(2, 8, 70, 128))["q"])
    assert driver.calls[1][0] == "f16" and driver.calls[1][-3:-1] == (128, 128)


def test_a_map_is_encoded_once_per_address_and_view(driver: Driver) -> None:
    one, other = (views(contiguous_problem(1, 8, n, 64))["q"] for n in (300, 301))
    for _ in range(3):
        for address, view in ((4096, one), (8192, one), (4096, other)):
            assert tensor_map.encode(address, view)[0] == address
    assert len(driver.calls) == 3


def test_the_driver_s_refusal_names_the_operand(driver: Driver) -> None:
    driver.result = 1
    with pytest.raises(
        RuntimeError, match=r"k: the driver encodes no tensor map of sizes \(64,.*1"
    ):
        tensor_map.encode(4096, views(contiguous_problem(1, 8, 300, 64))["k"])


def test_without_the_binding_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    tensor_map.binding.cache_clear()
    with pytest.raises(RuntimeError, match=r"pip install 'cuda-bindings==12"):
        tensor_map.encode(4096, views(contiguous_problem(1, 8, 300, 64))["k"])


def test_the_binding_has_what_is_asked_of_it() -> None:
    """All names, without a driver: the stand-in has no others."""
    real: Any = pytest.importorskip("cuda.bindings.driver")
    for name, stand_in in vars(Driver).items():
        if isinstance(stand_in, SimpleNamespace):
            for member in vars(stand_in):
                assert hasattr(getattr(real, name), member)
    for name in ("cuTensorMapEncodeTiled", "cuuint64_t", "cuuint32_t"):
        assert callable(getattr(real, name))
    assert callable(real.CUtensorMap.getPtr)


def test_hopper_s_struct_begins_with_the_others() -> None:
    shared, own = params.ATTENTION_PARAMS.fields, params.HOPPER_PARAMS.fields
    assert {name: own[name] for name in shared} == dict(shared)
    offsets = [own[f"{name}_map"][1] for name in "qkvo"]
    assert offsets == [640, 768, 896, 1024] and params.HOPPER_PARAMS.itemsize == 1152
    problem = contiguous_problem(1, 8, 300, 64)
    assert config_of(problem).params_bytes == 1152
    assert fixed(problem, KERNEL).dtype == params.HOPPER_PARAMS
    assert fixed(problem, KERNEL)["seqlen_q"] == 300


def test_parameters_are_copied() -> None:
    given = np.zeros((), params.HOPPER_PARAMS)
    given["q_map"], given["splits"] = np.arange(16), 3
    blocks = [ParameterBlock(given)]
    blocks.append(blocks[0].copy())
    for block in blocks:
        assert block.bytes.tobytes() == given.tobytes() == block.words.tobytes()
    blocks[0].words[1] = 5
    assert blocks[0].bytes[8] == 5
    blocks[0].bytes[:] = 0
    assert set(blocks[0].words) == {0}
    assert blocks[1].bytes.tobytes() == given.tobytes()


def test_maps_of_arrays(driver: Driver) -> None:
    problem = contiguous_problem(1, 8, 300, 64)
    places = {"q": 4096, "k": 8192, "v": 16384, "o": 32768}
    arrays = {name: array_at(place) for name, place in places.items()}
    found = tensor_map.maps_of(list(views(problem).values()), arrays)
    assert {name: int(words[0]) for name, words in found.items()} == places


def test_arrays_without_elements_have_no_address(driver: Driver) -> None:
    problem = contiguous_problem(1, 8, 300, 64, seqlen_kv=0)
    arrays = {"q": array_at(4096), "k": array_at(0), "v": array_at(0), "o": array_at(8192)}
    found = tensor_map.maps_of(list(views(problem).values()), arrays)
    assert [int(found[name][0]) for name in "qkvo"] == [4096, 4096, 4096, 8192]
    assert all(min(call[3]) >= 1 for call in driver.calls)


def known_call(problem: AttentionProblem, chosen: KernelConfig) -> launch_cache._KnownCall:
    """What is remembered of a call with arrays at 64, 128, ..."""
    step = Step(0, 1, 32, 0, ParameterBlock(fixed(problem, chosen.kernel)))
    x = {"shape": (1, 8, 300, 64), "strides": (307200, 38400, 128, 2), "dtype": np.dtype("f2")}
    return launch_cache._KnownCall(
        SimpleNamespace(
            problem=problem,
            selection=SimpleNamespace(config=chosen),
            views=chosen.views(problem, output_of(problem)),
            workspace_bytes=(0, 0),
            steps=(step,),
            arrays={name: array_at(64 * n, x) for n, name in enumerate("qkvo", 1)},
        )
    )


def test_a_repeated_call_gets_the_maps_of_its_addresses(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = contiguous_problem(1, 8, 300, 64)
    known = known_call(problem, config_of(problem))
    launched: list[Any] = []

    def launch_kernel(*arguments: Any) -> None:
        pointer = ctypes.c_uint64.from_address(arguments[-2]).value
        raw = ctypes.string_at(pointer, params.HOPPER_PARAMS.itemsize)
        launched.append(np.frombuffer(raw, params.HOPPER_PARAMS)[0])

    class Array(SimpleNamespace):
        pass

    def array(address: int) -> Array:
        return Array(data=SimpleNamespace(ptr=address, device_id=0))

    for name, fake in {
        "_ndarray": Array,
        "_empty": lambda shape, dtype: array(2**30),
        "_current_device": lambda: 0,
        "_set_device": lambda device: None,
        "_current_stream": lambda: SimpleNamespace(ptr=7),
        "_is_captured": lambda stream: False,
        "_launch_kernel": launch_kernel,
        "_key": lambda *arguments: "key",
        "_known": {"key": known},
        "_environment_changed": lambda: False,
    }.items():
        monkeypatch.setattr(launch_cache, name, fake)
    places = [(4096, 8192, 16384), (4096, 8192, 2**46), (8192, 4096, 16384), (4096, 8192, 16384)]
    for place in places:
        assert launch_cache.launch_again(*map(array, place), None, False, ()) is not None
    for place, got in zip(places, launched, strict=True):
        assert [int(got[name]) for name in "qkv"] == list(place)
        assert [int(got[f"{name}_map"][0]) for name in "qkvo"] == [*place, 2**30]
        assert got["seqlen_q"] == 300
    assert len(driver.calls) == 8, "the first maps, and each of them elsewhere; others are moved"
    here = {64, 128, 192, 256}
    assert {call[2] for call in driver.calls} == here | {n + tensor_map._ELSEWHERE for n in here}


def test_maps_that_cannot_be_moved_are_encoded(driver: Driver) -> None:
    """Of a driver that keeps the address elsewhere, or something else that depends on it."""
    problem = contiguous_problem(1, 8, 300, 64)
    plain = driver.cuTensorMapEncodeTiled

    def encode(*arguments: Any) -> tuple[int, Any]:
        result, encoded = plain(*arguments)
        (ctypes.c_uint64 * 16).from_address(encoded.getPtr())[5] = arguments[2] >> 33
        return result, encoded

    driver.cuTensorMapEncodeTiled = encode  # type: ignore[method-assign]
    for found, place in moved(problem, config_of(problem), movable=False):
        assert found[0::16].tolist() == list(place)
        assert found[5::16].tolist() == [n >> 33 for n in place]


def test_moved_maps_keep_the_distance_to_the_first_key(driver: Driver) -> None:
    """A window's v begins at the first key that is seen."""
    problem = ruled(contiguous_problem(1, 8, 300, 64, seqlen_kv=700), window=(100, 0))
    first = views(problem)["v"].offset
    assert first == 300 * 128
    for found, (q, k, v, o) in moved(problem, config_of(problem)):
        assert found[0::16].tolist() == [q, k, v + first, o]


def test_calls_of_other_kernels_have_no_maps(driver: Driver) -> None:
    problem = contiguous_problem(1, 8, 300, 64)
    assert (
        known_call(problem, selector.select(problem, HOPPER, kernel="mma_sm80").config).maps is None
    )
    assert known_call(problem, config_of(problem)).maps is not None


# --- what is stored through shared memory ---------------------------------------------------------

STAGED = [
    (64, 64, {}, 64),
    (96, 96, {}, 64),
    (96, 96, {"num_stages": 2}, 96),
    (128, 128, {}, 128),
    (192, 192, {}, 128),
    (192, 128, {}, 64),
    (192, 128, {"block_n": 112}, 128),
    (256, 256, {"block_n": 80}, 0),
    (256, 256, {"block_n": 64}, 128),
    (40, 24, {}, 64),
]


@pytest.mark.parametrize(("dim", "dim_v", "changes", "columns"), STAGED)
def test_as_many_columns_as_there_is_room_for_are_staged(
    dim: int, dim_v: int, changes: dict[str, int], columns: int
) -> None:
    problem = contiguous_problem(4, 32, 4096, dim, head_dim_v=dim_v)
    chosen = config_of(problem, **changes)
    assert chosen.defines()["FC_STAGED_COLS"] == chosen.staged_cols == columns
    assert chosen.smem_bytes <= SMEM_LIMIT
    without = replace(chosen, tma_stores=False)
    assert chosen.smem_bytes - without.smem_bytes == 2 * chosen.tile.block_m * columns
    assert ("o" in views(problem, **changes)) == (columns > 0)
    ways = ["by TMA"] * (columns > 0) + ["of 16 bytes"] * (columns < chosen.head_dim_v)
    assert chosen.describe().endswith(f"stores {' and '.join(ways)}")


def test_boxes_of_the_output_are_of_one_head() -> None:
    problem = contiguous_problem(2, 8, 300, 64, heads_kv=2)
    assert config_of(problem).staged_cols == 64
    assert config_of(replace(problem, gate="pv")).staged_cols == 64
    assert config_of(replace(problem, gate="qk")).staged_cols == 0, "there is no output"
    decode = contiguous_problem(2, 8, 1, 64, heads_kv=2, seqlen_kv=300)
    assert config_of(decode).tile.pack_gqa and config_of(decode).staged_cols == 0
    x = np.empty((600, 8, 64), np.float16)
    packed = describe(x, x, x, sequences=2)
    assert config_of(packed).staged_cols == 64


def test_outputs_that_tma_cannot_address_are_stored_directly() -> None:
    problem = contiguous_problem(2, 8, 300, 64)
    base = np.empty((2, 8, 300, 144), np.float16)
    for x, columns, align in (
        (base[..., :64], 64, 16),
        (base[:, :, ::-1, :64], 0, 16),
        (np.empty((2, 8, 300, 68), np.float16)[..., :64], 0, 8),
    ):
        chosen = config_of(problem).stored_to(output_of(problem, x))
        assert (chosen.staged_cols, chosen.align_bytes) == (columns, align)
        whole = config_of(problem).smem_bytes
        assert chosen.smem_bytes == whole - 2 * chosen.tile.block_m * (64 - columns)


# --- which problems -------------------------------------------------------------------------------


def refusal(problem: AttentionProblem, arch: str = HOPPER, *, auto: bool = False) -> str:
    with pytest.raises(ValueError) as caught:
        selector.configure(problem, registry.KERNELS[KERNEL], arch, auto=auto)
    return str(caught.value)


def test_tiles_fit_and_have_a_warpgroup_more_than_consumers() -> None:
    for row in selector.rows_of(KERNEL):
        chosen = selector.configure_row(row, contiguous_problem(1, 1, 1, row.dims[0]))
        assert chosen.smem_bytes <= SMEM_LIMIT and chosen.smem_bytes % 1024 == 0
        assert chosen.threads == 128 + 2 * row.tile.block_m
        assert selector.check_target(row, chosen, HOPPER) == chosen
        assert chosen.softmax_keys == row.tile.block_n


def test_shared_memory() -> None:
    """The next block's Q has a place of its own, unless that is too much; then O."""
    tile = {"block_m": 128, "warps_m": 8, "num_stages": 2}
    chosen = config_of(contiguous_problem(4, 16, 2048, 128), block_n=128, **tile)
    assert chosen.smem_bytes == 3 * (128 * 128 * 2) + 2 * (128 * 256 * 2) + 2048
    chosen = config_of(contiguous_problem(4, 16, 2048, 256), block_n=64, **tile)
    assert chosen.smem_bytes == 128 * (256 + 128) * 2 + 2 * (64 * 512 * 2) + 2048


def test_it_is_described_by_its_warpgroups() -> None:
    tile = {"block_m": 192, "block_n": 128, "warps_m": 12, "num_stages": 2}
    found = config_of(contiguous_problem(4, 16, 2048, 64), **tile).describe()
    assert found.startswith("192x128 tile, 3 consumer warpgroups, 2 stages, TMA, head dim 64")
    found = config_of(contiguous_problem(1, 8, 512, 64)).describe()
    assert found.startswith("64x128 tile, 1 consumer warpgroup, 2 stages, TMA, head dim 64")


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90", "sm_100", "sm_120"])
def test_it_is_for_one_target(arch: str) -> None:
    problem = contiguous_problem(4, 16, 2048, 64)
    assert refusal(problem, arch) == f"needs wgmma, which sm_90a alone has; the target is {arch}"


def test_it_has_every_rule() -> None:
    problem = contiguous_problem(4, 16, 2048, 64)
    bias, mask = np.zeros((1, 2048), np.float32), np.ones((1, 2048), bool)
    for rules in (
        {"bias": spec_of(bias)},
        {"mask_mod": "true", "softcap": 3.0},
        {"mask": spec_of(mask), "softcap": 3.0},
    ):
        chosen = selector.select(ruled(problem, **rules), HOPPER)
        assert chosen.kernel.name == KERNEL
        assert set(rules) <= {name.removesuffix("_fp32") for name in chosen.config.rules}
    unaligned = spec_of(np.ones((1, 2049), bool)[:, 1:])
    assert refusal(ruled(problem, mask=unaligned)).startswith("reads a mask 16 keys at a time")
    for rules in ({"window": (50, 3)}, {"softcap": 3.0}, {"score_mod": "score * 2"}):
        assert config_of(ruled(problem, **rules)).rules == tuple(
            name for name in rules if name != "window"
        )
    for scale in (-1.0, 0.0):
        assert config_of(replace(problem, softmax_scale=scale)).rules == ("scale_first",)
        assert fixed(replace(problem, softmax_scale=scale), KERNEL)["softmax_scale"] == scale


def test_types_and_widths_that_it_has_not() -> None:
    assert "not float32" in refusal(contiguous_problem(4, 16, 2048, 64, dtype="float32"))
    assert (
        refusal(contiguous_problem(4, 16, 2048, 512))
        == "takes head dims up to 256 in float16, not 512"
    )


def layout_refusal(*operands: np.ndarray, addresses: tuple[int, int, int] = (0, 0, 0)) -> str:
    return refusal(describe(*operands, addresses=addresses))


def test_arrays_that_tma_cannot_address_are_named() -> None:
    x = np.empty((2, 8, 300, 64), np.float16)
    wide = np.empty((2, 8, 300, 68), np.float16)[..., :64]  # rows 136 bytes apart
    odd = np.empty((2, 8, 300, 36), np.float16)
    broadcast = np.broadcast_to(x[:, :1], x.shape)
    backwards = x[:, :, ::-1]
    said = "loads by TMA: needs rows that start and end on multiples of 16 bytes, and positive "
    said += "strides, unlike those of "
    assert layout_refusal(x, wide, x) == said + "k"
    assert layout_refusal(wide, x, wide) == said + "q, v"
    assert layout_refusal(x, x, x, addresses=(0, 8, 0)) == said + "k"
    assert layout_refusal(odd, odd, odd) == said + "q, k, v"
    assert layout_refusal(x, broadcast, broadcast) == said + "k, v"
    assert layout_refusal(x, x, backwards) == said + "v"
    far = np.lib.stride_tricks.as_strided(x, x.shape, (2**40, *x.strides[1:]))
    assert layout_refusal(far, x, x) == said + "q"
    near = np.lib.stride_tricks.as_strided(x, x.shape, (2**40 - 16, *x.strides[1:]))
    assert config_of(describe(near, x, x)).kernel == KERNEL
    empty = np.empty((2, 8, 0, 64), np.float16)
    assert config_of(describe(x, empty, empty)).kernel == KERNEL


def test_small_grids_are_left_to_others_unless_it_is_named() -> None:
    """By name it takes any; for "auto" only more than 12 blocks."""
    few_blocks = "is for larger grids"
    for problem, reason in (
        (contiguous_problem(1, 2, 100, 80, head_dim_v=192), few_blocks),
        (contiguous_problem(1, 12, 128, 64, seqlen_kv=5000), few_blocks),
        (contiguous_problem(1, 3, 512, 256), few_blocks),
        (contiguous_problem(1, 8, 1, 64, seqlen_kv=1000), few_blocks),
    ):
        assert refusal(problem, auto=True) == reason
        assert config_of(problem).kernel == KERNEL
        found = selector.select(problem, HOPPER)
        assert found.kernel.name == "mma_sm80" and found.passed_over == ((KERNEL, reason),)
    for problem in (
        contiguous_problem(1, 8, 512, 64),
        contiguous_problem(1, 13, 128, 64),
        contiguous_problem(1, 2, 1024, 256),
        contiguous_problem(4, 16, 2048, 128),
        contiguous_problem(64, 32, 5, 128, heads_kv=8, seqlen_kv=4096),
        contiguous_problem(64, 32, 4, 128, heads_kv=8, seqlen_kv=4096),
        contiguous_problem(64, 32, 1, 128, seqlen_kv=4096),
        contiguous_problem(1, 13, 1, 64),
    ):
        found = selector.configure(problem, registry.KERNELS[KERNEL], HOPPER, auto=True)
        assert found == config_of(problem)
    packed = [np.empty((100, 8, 64), np.float16)] * 3
    assert refusal(describe(*packed, sequences=3), auto=True) == few_blocks
    packed = [np.empty((6400, 8, 64), np.float16)] * 3
    assert selector.configure(
        describe(*packed, sequences=3), registry.KERNELS[KERNEL], HOPPER, auto=True
    )
    few = selector.configure(
        describe(*packed, sequences=6400), registry.KERNELS[KERNEL], HOPPER, auto=True
    )
    assert few.tile.split_kv


@pytest.mark.parametrize("seqlen_q", [1, 5, 100, 3000])
def test_batch_invariant_problems_do_not_look_at_the_grid(seqlen_q: int) -> None:
    found = set()
    for batch in (1, 2, 500):
        problem = contiguous_problem(batch, 8, seqlen_q, 64, heads_kv=2)
        packed = [np.empty((batch * seqlen_q, heads, 64), np.float16) for heads in (8, 2, 2)]
        for each in (problem, describe(*packed, sequences=batch)):
            each = replace(each, batch_invariant=True)
            chosen = selector.configure(each, registry.KERNELS[KERNEL], HOPPER, auto=True)
            found.add(chosen.tile)
    assert len(found) == 1


ILLEGAL = [
    ({"block_m": 128, "warps_m": 12}, "block_m=128, warps_m=12: one to three warpgroups"),
    ({"block_m": 256, "warps_m": 16}, "warps_m=4, 8 or 12"),
    ({"block_m": 96, "warps_m": 6}, "warps_m=4, 8 or 12"),
    ({"block_n": 40}, "block_n=40 is not a multiple of 16 up to 256"),
    ({"block_n": 272}, "block_n=272 is not a multiple of 16 up to 256"),
    ({"num_stages": 5}, "num_stages=5; at most 4"),
    ({"num_stages": 0}, "num_stages=0 is not positive"),
    ({"warps_n": 2, "cp_async": True}, "wgmma_sm90 has no warps_n, cp_async"),
    ({"warps_d": 2}, "wgmma_sm90 has no warps_d"),
    ({"warp_softmax": True, "fp8": True}, "wgmma_sm90 has no warp_softmax, fp8"),
    (
        {"block_m": 128, "warps_m": 8, "pack_gqa": True},
        "wgmma_sm90 has pack_gqa and split_kv for one consumer warpgroup alone",
    ),
    (
        {"block_m": 192, "warps_m": 12, "split_kv": True},
        "wgmma_sm90 has pack_gqa and split_kv for one consumer warpgroup alone",
    ),
    ({"block_n": 256, "num_stages": 4}, "bytes of shared memory at head dim 64"),
]


@pytest.mark.parametrize(("changes", "message"), ILLEGAL)
def test_illegal_tiles_say_why(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match="kernel 'wgmma_sm90': ") as caught:
        config_of(contiguous_problem(1, 8, 512, 64), **changes)
    assert message in str(caught.value)


def test_legal_tiles() -> None:
    problem = contiguous_problem(1, 8, 512, 64, dtype="bfloat16")
    for warps_m, block_n, stages in ((4, 16, 1), (8, 176, 3), (12, 256, 2), (12, 64, 4)):
        chosen = config_of(
            problem, block_m=16 * warps_m, warps_m=warps_m, block_n=block_n, num_stages=stages
        )
        assert chosen.defines()["FC_SMEM_BYTES"] == chosen.smem_bytes
        found = chosen.views(problem, output_of(problem))
        expected = [(64, 64, 1), (64, block_n, 1), (64, block_n, 1), (64, 16, 1)]
        assert [view.box for view in found] == expected[: 3 + (chosen.staged_cols > 0)]


def test_types_have_maps() -> None:
    for dtype in registry.KERNELS[KERNEL].dtypes:
        kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16
        x = np.empty((1, 8, 300, 64), kind)
        assert {view.dtype for view in views(describe(x, x, x)).values()} == {dtype}
        assert hasattr(Driver.CUtensorMapDataType, f"CU_TENSOR_MAP_DATA_TYPE_{dtype.upper()}")
