"""Repeated calls with rules hand the driver what a first call would, by every kernel."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cases_repeats import Arrays, B, D, H, S, T, lists, loaded, no_gpu
from noted_launches import Array, Driver
from places import PACKED, RULED

from flashcore_cupy import attention, attention_backward
from flashcore_cupy.launch import (
    backward_cache,
    once,
    plan,
    ruled_cache,
)
from flashcore_cupy.problem.philox import key_of
from flashcore_cupy.problem.rng import integer_key
from flashcore_cupy.select.backward_table import BACKWARD_KERNELS
from flashcore_cupy.select.registry import KERNELS

attention_module = sys.modules["flashcore_cupy.attention"]
backward_module = sys.modules["flashcore_cupy.backward"]


@pytest.fixture(params=[True, False], ids=["maps move", "maps are encoded"])
def driver(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Driver:
    return no_gpu(monkeypatch, movable=request.param)


def flex(new: Arrays) -> Any:
    """A BlockMask of torch's, by its attributes; with full blocks alone."""
    mask = lists(new)
    names = "kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"
    found = dict.fromkeys(names[:2]) | {n: mask.arrays[n] for n in names[2:]}
    empty = new(1, H, 3, dtype="int32"), new(1, H, 3, 0, dtype="int32")
    found |= dict(zip(names[:2], empty, strict=True))
    return SimpleNamespace(**found, BLOCK_SIZE=(128, 128), seq_lengths=(S, T))


#: What a call brings besides q, k and v, from new arrays.
RULES: dict[str, Any] = {
    "slopes": lambda new: {"alibi_slopes": new(H, dtype="float32"), "causal": True},
    "bias": lambda new: {"bias": new(1, H, S, T), "window": (50, 20)},
    "bias of float32": lambda new: {"bias": new(H, 1, T, dtype="float32")},
    "mask": lambda new: {"mask": new(S, T, dtype="bool"), "softcap": 3.0},
    "sink": lambda new: {"sink": new(H, dtype="float32"), "softmax_scale": 0.25},
    "mods": lambda new: {
        "score_mod": "score + x[h] * y[b]",
        "mask_mod": "kv_idx % 2 == 0 || q_idx < y[b]",
        "mod_args": {"x": new(H, dtype="float32"), "y": new(B)},
    },
    "dropout": lambda new: {"dropout_p": 0.1, "rng": (new.next % 2**63, 2**64 - 1)},
    "dropout of an array": lambda new: {"dropout_p": 0.1, "rng": new(2, dtype="uint64")},
    "all": lambda new: {
        "alibi_slopes": new(B, H, dtype="float32"), "bias": new(S, T),
        "mask": new(B, 1, 1, T, dtype="bool"), "sink": new(H, dtype="float32"),
        "dropout_p": 0.5, "rng": (1, 2), "score_mod": "tanhf(score)", "causal": "top-left",
    },
}  # fmt: skip
BLOCKS: dict[str, Any] = {
    "lists": lambda new: {"block_mask": lists(new), "mask_mod": "q_idx >= kv_idx"},
    "lists with a rule": lambda new: {
        "block_mask": lists(new, mask_mod="q_idx > x[b]", mod_args={"x": new(B)}),
        "score_mod": "score * z[h]", "mod_args": {"z": new(H)},
    },
    "lists with a mask": lambda new: {
        "block_mask": lists(new, mask=new(S, T, dtype="bool")), "causal": True,
    },
    "flex": lambda new: {"block_mask": flex(new)},
}  # fmt: skip


LISTED = [name for name in RULED if KERNELS[name].family.takes_blocks]


def operands(new: Arrays) -> tuple[Array, Array, Array]:
    return new(B, H, S, D), new(B, 2, T, D), new(B, 2, T, D)


def of_packed(new: Arrays) -> tuple[tuple[Array, ...], dict[str, Any]]:
    bounds = {f"cu_seqlens_{x}": new(5, dtype="int32") for x in "qk"}
    return (new(S, H, D), new(T, 2, D), new(T, 2, D)), {**bounds, "causal": True}


def call(kernel: str, given: Any, rules: dict[str, Any], **more: Any) -> Any:
    return attention(*given, kernel=kernel, **rules, **more)


def check(driver: Driver, make: Any, run: Any, *, known: Any, bind_name: tuple[Any, str]) -> None:
    """What a second call launches is what a first call with the same arrays would launch."""
    for known_calls in (0, 1):
        run(*make(Arrays(2**30)))
        assert len(known) == known_calls, "it is remembered when it comes again"
    place = driver.next
    for start in (2**33, 2**35 + 2**12, 2**33):
        driver.next = place
        driver.launches.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(*bind_name, None)  # the long way is closed
            run(*make(Arrays(start)))
        got = driver.launches[:]
        kept = dict(known)
        known.clear()
        once._seen.clear()
        driver.next = place
        driver.launches.clear()
        run(*make(Arrays(start)))
        assert len(got) == len(driver.launches) > 0
        for one, other in zip(got, driver.launches, strict=True):
            assert one[:2] == other[:2]
            assert one.contents.startswith(other.contents), "what is behind is another launch's"
        known.clear()
        known.update(kept)


@pytest.mark.parametrize(
    ("kernel", "name"),
    [
        *((kernel, name) for kernel in RULED for name in RULES),
        *((kernel, name) for kernel in LISTED for name in BLOCKS),
    ],
)
@pytest.mark.parametrize("lse", [False, True])
def test_a_repeated_call_launches_what_a_first_would(
    driver: Driver, kernel: str, name: str, lse: bool
) -> None:
    check(
        driver,
        lambda new: (operands(new), {**RULES, **BLOCKS}[name](new)),
        lambda given, rules: call(kernel, given, rules, return_lse=lse),
        known=ruled_cache._known,
        bind_name=(attention_module, "bind"),
    )


@pytest.mark.parametrize("kernel", PACKED)
def test_packed_batches(driver: Driver, kernel: str) -> None:
    check(
        driver,
        of_packed,
        lambda given, rules: call(kernel, given, rules),
        known=ruled_cache._known,
        bind_name=(attention_module, "bind"),
    )


def of_own_lists(new: Arrays) -> tuple[tuple[Array, ...], dict[str, Any]]:
    """A call that is large enough to ask its mask_mod ahead."""
    rules = {
        "mask_mod": "document[q_idx] == document[kv_idx] || near[0] > kv_idx",
        "mod_args": {"document": new(1024, dtype="int32"), "near": new(1, dtype="float32")},
        "mask": new(16, 1, 1, 1024, dtype="bool"),
    }
    return tuple(new(16, 16, 1024, 64) for _ in range(3)), rules


@pytest.mark.parametrize("kernel", LISTED)
@pytest.mark.parametrize("lse", [False, True])
def test_lists_that_a_call_makes(driver: Driver, kernel: str, lse: bool) -> None:
    check(
        driver,
        of_own_lists,
        lambda given, rules: call(kernel, given, rules, return_lse=lse),
        known=ruled_cache._known,
        bind_name=(attention_module, "bind"),
    )
    driver.launches.clear()
    given, rules = of_own_lists(Arrays(2**33))
    call(kernel, given, rules, return_lse=lse)
    blocks, tiles, _ = driver.launches
    assert blocks.geometry[1] == 16 * 8, "a thread block for each list"
    words = set(np.frombuffer(blocks.contents, np.uint64).tolist())
    assert {x.data.ptr for x in (rules["mask"], *rules["mod_args"].values())} <= words
    made = words & set(np.frombuffer(tiles.contents, np.uint64).tolist())
    scratch = driver.made[-1]
    inside = {x for x in made if scratch.data.ptr <= x < scratch.data.ptr + scratch.nbytes}
    assert len(inside) == 4, "counts and indices, of mixed and of full blocks"


LISTED_BACKWARD = [name for name, family in BACKWARD_KERNELS.items() if family.takes_blocks]
GRADIENTS: dict[str, tuple[str, ...]] = {
    "slopes": ("q", "alibi_slopes"),
    "bias": ("q", "k", "v", "bias"),
    "bias of float32": ("bias",),
    "sink": ("k", "sink"),
    "mods": ("q", "k", "v", "mod_args.x"),
}


def take_gradients(kernel: str, name: str, given: Any, rules: dict[str, Any], **more: Any) -> Any:
    do, o, lse, *qkv = given
    wrt = GRADIENTS.get(name, ("q", "k", "v"))
    return attention_backward(do, *qkv, o, lse, wrt=wrt, kernel=kernel, **rules, **more)


def of_gradients(new: Arrays, make: Any) -> tuple[tuple[Array, ...], dict[str, Any]]:
    first = new(B, H, S, D), new(B, H, S, D), new(B, H, S, dtype="float32")
    return (*first, *operands(new)), make(new)


@pytest.mark.parametrize(
    ("kernel", "name"),
    [
        *((kernel, name) for kernel in ("bwd_sm80", "bwd_sm90") for name in RULES),
        *((kernel, name) for kernel in LISTED_BACKWARD for name in BLOCKS),
    ],
)
def test_gradients_of_a_repeated_call(driver: Driver, kernel: str, name: str) -> None:
    if name == "mods" and kernel == "bwd_sm90":
        kernel = "auto"  # it has no gradients of mod_args
    check(
        driver,
        lambda new: of_gradients(new, {**RULES, **BLOCKS}[name]),
        lambda given, rules: take_gradients(kernel, name, given, rules),
        known=backward_cache._known,
        bind_name=(backward_module, "bind_backward"),
    )


def test_gradients_of_packed_batches(driver: Driver) -> None:
    def make(new: Arrays) -> Any:
        lse = new(H, S, dtype="float32")
        qkv, rules = of_packed(new)
        return (new(S, H, D), new(S, H, D), lse, *qkv), rules

    check(
        driver,
        make,
        lambda given, rules: take_gradients("auto", "packed", given, rules),
        known=backward_cache._known,
        bind_name=(backward_module, "bind_backward"),
    )


# --- what a call is known by ----------------------------------------------------------------------


@pytest.fixture
def closed(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The long way does nothing but say so."""

    def take(*_: Any, **__: Any) -> None:
        raise RuntimeError("the long way")

    return lambda: monkeypatch.setattr(attention_module, "bind", take)


def takes_long_way(given: Any, rules: dict[str, Any], **more: Any) -> bool:
    try:
        attention(*given, **rules, **more)
    except RuntimeError as error:
        assert str(error) == "the long way"
        return True
    return False


def test_calls_that_differ_are_told_apart(driver: Driver, closed: Any) -> None:
    new = Arrays(2**30)
    given, rules = operands(new), RULES["mods"](new) | {"bias": new(1, H, S, T)}
    for _ in range(2):
        attention(*given, **rules)
    closed()
    assert not takes_long_way(given, rules)
    x, y = rules["mod_args"]["x"], rules["mod_args"]["y"]
    others: list[dict[str, Any]] = [
        {"score_mod": "score"},
        {"mask_mod": None},
        {"mod_args": {"x": x, "y": Array(y.shape, "float32", y.data.ptr)}},
        {"mod_args": {"x": x, "y": Array((B, 1), y.dtype, y.data.ptr)}},
        {"mod_args": {"x": Array(x.shape, x.dtype, x.data.ptr + 4), "y": y}},
        {"bias": new(1, 1, S, T)},
        {"bias": new(1, H, S, T, dtype="float32")},
        {"bias": new(1, H, S, T, strides=(0, 2 * S * (T + 8), 2 * (T + 8), 2))},
        {"bias": None},
        {"sink": new(H, dtype="float32")},
        {"causal": True},
        {"window": (5, 5)},
        {"return_lse": True},
        {"batch_invariant": True},
        {"kernel": "mma_sm80"},
        {"out": new(B, H, S, D)},
        {"dropout_p": 0.1, "rng": (1, 2)},
    ]
    for changes in others:
        assert takes_long_way(given, rules | changes), changes
    assert not takes_long_way(given, rules), "what was asked for in between changes nothing"
    reordered = rules | {"mod_args": {"y": y, "x": x}}
    assert takes_long_way(given, reordered), "their order is that of the kernel's pointers"


def test_a_key_of_dropout_is_new_in_each_call(driver: Driver, closed: Any) -> None:
    new = Arrays(2**30)
    given = operands(new)
    for _ in range(2):
        attention(*given, dropout_p=0.1, rng=(1, 2))
    closed()
    seen = set()
    for rng in ((1, 3), (2, 2), [2**64 - 1, 2**63], (0, 0)):
        driver.launches.clear()
        assert not takes_long_way(given, {"dropout_p": 0.1, "rng": rng})
        (launch,) = driver.launches
        (known,) = ruled_cache._known.values()
        words = np.frombuffer(launch.contents, np.uint64)
        key = integer_key((rng[0], rng[1]))
        assert key == int(key_of(np.array(rng, np.uint64))[0])
        assert [int(words[x.word]) for x in known.launches[0].places if x.which == 4] == [key]
        seen.add(key)
    assert len(seen) == 4
    for wrong in ((1,), (1, -1), (1, 2**64), (1.0, 2), "12", None):
        with pytest.raises((TypeError, ValueError), match="rng"):
            attention(*given, dropout_p=0.1, rng=wrong)


def test_an_output_is_given(driver: Driver, closed: Any) -> None:
    new = Arrays(2**30)
    given, mask, out = operands(new), new(S, T, dtype="bool"), new(B, H, S, D)
    for _ in range(2):
        attention(*given, mask=mask, out=out)
    closed()
    assert not takes_long_way(given, {"mask": mask}, out=new(B, H, S, D))
    at_8 = Array(out.shape, out.dtype, out.data.ptr + 8)
    assert takes_long_way(given, {"mask": mask}, out=at_8)
    inside = Array((B, H, S, D), "float16", mask.data.ptr + 16 * 100)
    for taken in (given[0], inside):
        with pytest.raises(ValueError, match="out: overlaps"):
            attention(*given, mask=mask, out=taken)


def test_what_is_not_this_gpus_takes_the_long_way(driver: Driver, closed: Any) -> None:
    new = Arrays(2**30)
    given, mask = operands(new), new(S, T, dtype="bool")
    for _ in range(2):
        attention(*given, mask=mask)
    closed()
    driver.captured = True  # what it allocates is the graph's
    with pytest.raises(AttributeError, match="get_allocator"):
        attention(*given, mask=mask)
    driver.captured = False
    other = Array(mask.shape, mask.dtype, mask.data.ptr, device=1)
    with pytest.raises(ValueError, match="mask: on GPU 1"):
        attention(*given, mask=other)
    with pytest.raises(TypeError, match="mask"):
        attention(*given, mask=np.ones((S, T), bool))
    assert not takes_long_way(given, {"mask": mask})


def test_what_was_converted_is_not_remembered(driver: Driver) -> None:
    new = Arrays(2**30)
    given = operands(new)
    turned = Array((B, H, S, D), ptr=new.next, strides=(H * S * D * 2, S * D * 2, 2, S * 2))
    for _ in range(2):
        attention(*given, mask_mod="kv_idx > 3", config={})
    assert not ruled_cache._known
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "load_kernel", loaded)
        copied = SimpleNamespace(array=lambda x, **_: new(*x.shape))
        patch.setattr(sys.modules["cupy"], "array", copied.array, raising=False)
        for _ in range(2):
            attention(turned, *given[1:], mask_mod="kv_idx > 3")
    assert not ruled_cache._known, "q was copied"


def test_results_are_where_the_last_launch_writes(driver: Driver) -> None:
    new = Arrays(2**30)
    given, rules = operands(new), {"block_mask": lists(new, mask_mod="kv_idx > q_idx")}
    for _ in range(3):
        driver.made.clear()
        o, lse = attention(*given, return_lse=True, **rules)
        assert (o.shape, o.dtype, lse.shape) == ((B, H, S, D), np.float16, (B, H, S))
        assert driver.made[0] is o and driver.made[1] is lse
    first, last = (np.frombuffer(x.contents, np.uint64) for x in driver.launches[-2:])
    assert {o.data.ptr, lse.data.ptr} <= set(last.tolist())
    assert o.data.ptr not in first.tolist()


# --- what an allocator gives, and what only looks like an argument --------------------------------


def test_an_allocator_may_give_memory_of_less_alignment(driver: Driver, closed: Any) -> None:
    new = Arrays(2**30)
    given, rules = operands(new), {"block_mask": lists(new, mask_mod="kv_idx > q_idx")}
    driver.next += 8
    for _ in range(2):
        attention(*given, **rules)
    assert not ruled_cache._known, "later ones would get a kernel that is built for less"
    driver.next -= 8
    for _ in range(2):
        attention(*given, **rules)
    closed()
    assert not takes_long_way(given, rules)
    driver.next += 4
    assert takes_long_way(given, rules)


def test_plain_calls_look_at_each_alignment(driver: Driver, closed: Any) -> None:
    """An output at 8 beside inputs at 16, then the other way round."""
    new = Arrays(2**30)
    q, k, v = operands(new)
    out = new(B, H, S, D)
    q_at_8, out_at_8 = (Array(x.shape, x.dtype, x.data.ptr + 8) for x in (q, out))
    attention(q, k, v, out=out_at_8)
    attention(q, k, v)
    closed()
    assert not takes_long_way((q, k, v), {}, out=out_at_8)
    assert takes_long_way((q_at_8, k, v), {}, out=out)
    assert takes_long_way((q, k, v), {}, out=out)
    assert not takes_long_way((q, k, v), {})
    driver.next += 8
    assert takes_long_way((q, k, v), {}), "what the allocator gives is not as the kernel wants it"


def test_what_only_looks_like_a_block_mask(driver: Driver) -> None:
    new = Arrays(2**30)
    given, mask = operands(new), flex(new)
    for _ in range(3):
        attention(*given, block_mask=mask)
    assert len(ruled_cache._known) == 1

    class Broken:
        @property
        def BLOCK_SIZE(self) -> int:
            raise RuntimeError("it is gone")

    with pytest.raises(TypeError, match="block_mask: got"):
        attention(*given, block_mask=Broken())
    with pytest.raises(ValueError, match="block"):
        attention(*given, block_mask=SimpleNamespace(**{**vars(mask), "BLOCK_SIZE": (128.0, 128)}))
    made = lists(new, mask_mod="kv_idx > q_idx")
    with pytest.raises(TypeError, match="arrays: got"):
        replace(made, arrays={**made.arrays, "extra": new(3)})
    made.arrays["extra"] = new(3)  # type: ignore[index]
    for _ in range(3):
        attention(*given, block_mask=made)


def test_a_draw_that_nothing_is_dropped_by(driver: Driver) -> None:
    new = Arrays(2**30)
    given = operands(new)
    for rng in (new(2, dtype="uint64"), (1, 2), None):
        attention(*given, rng=rng)
    lse = new(B, H, S, dtype="float32")
    attention_backward(new(B, H, S, D), *given, new(B, H, S, D), lse, rng=new(2, dtype="uint64"))
