"""What integrations hand over and get back, without torch and without JAX."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest
from cases_gradients import random

from flashcore_cupy import attention, attention_backward
from flashcore_cupy.integrations import engine
from flashcore_cupy.problem.block_lists import InKernel
from flashcore_cupy.problem.block_mask import BlockMask
from flashcore_cupy.problem.gradients import by_result
from flashcore_cupy.problem.mod_elements import label

FORWARD = {"q": (2, 3, 5, 8), "k": (2, 3, 6, 8), "v": (2, 3, 6, 8)}


def arrays(lead: tuple[int, ...], batch: int, more: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    shapes = {name: (batch, *shape[1:]) for name, shape in FORWARD.items()} | more
    return {n: random(*lead, *shape, seed=i) for i, (n, shape) in enumerate(shapes.items())}


@pytest.mark.parametrize("lead", [(), (4,), (2, 3), (1, 1)])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    ("more", "options", "folds"),
    [
        ({}, {"causal": True}, (1, 2)),
        ({"bias": (2, 3, 5, 6)}, {}, (2,)),
        ({"bias": (3, 5, 6)}, {}, (1,)),
        ({"bias": (1, 1, 1, 6)}, {}, (1,)),
        ({"alibi_slopes": (3,)}, {}, (1,)),
        ({"alibi_slopes": (2, 3)}, {}, (2,)),
        ({"sink": (3,)}, {}, ()),
        ({}, {"dropout_p": 0.3, "rng": (5, 2)}, ()),
        ({"mod_args.x": (5,)}, {"score_mod": lambda s, b, h, i, j, x: s * x[b]}, ()),
    ],
    ids=lambda x: str(x)[:30],
)
def test_mapped_axes(
    more: Any, options: Any, folds: Any, batch: int, lead: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one call where that is the same, else as many; with the results of many."""
    rule = next(iter(more), "")
    if batch == 1 and more.get(rule, ())[:1] == (2,):
        more = {rule: (1, *more[rule][1:])}
        folds = (1,)
    given = arrays(lead, batch, more)
    calls = []
    spied = engine._functions["attention"]
    monkeypatch.setitem(engine._functions, "attention", lambda **x: calls.append(1) or spied(**x))
    o, lse = engine.forward(options, given)
    count = math.prod(lead)
    assert len(calls) == (1 if not lead or batch in folds else count)
    assert o.shape == (*lead, batch, 3, 5, 8) and lse.shape == (*lead, batch, 3, 5)
    wrt = ("q", "k", "v", *(name for name in more if engine.has_gradient(name)))
    do = random(*o.shape, seed=9)
    found = engine.backward(options, wrt, given | {"o": o, "lse": lse, "do": do})
    for at in np.ndindex(*lead):
        one = engine.joined({name: x[at] for name, x in given.items()}, options)
        wanted = attention(**one, return_lse=True)
        np.testing.assert_array_equal(o[at], wanted[0])
        np.testing.assert_array_equal(lse[at], wanted[1])
        of = attention_backward(do[at], o=wanted[0], lse=wanted[1], **one, wrt=wrt)
        for name, x in zip(wrt, found, strict=True):
            assert x.shape == given[name].shape
            np.testing.assert_array_equal(x[at], by_result(of)[f"d{name}"])


@pytest.mark.parametrize("as_text", [False, True])
def test_draws_of_mapped_calls(as_text: bool) -> None:
    """Each has its own, and both directions the same."""
    given = arrays((4,), 2, {})
    given["rng"] = np.arange(8, dtype=np.uint64).reshape(4, 2) + np.uint64(2**63)
    options: Any = {"dropout_p": 0.3, "causal": True}
    text = engine.encode(options) if as_text else options
    o, lse = engine.forward(text, given)
    do = random(*o.shape, seed=9)
    dq, dv = engine.backward(text, ("q", "v"), given | {"o": o, "lse": lse, "do": do})
    for n in range(4):
        one = {name: x[n] for name, x in given.items() if name != "rng"}
        one |= options | {"rng": tuple(map(int, given["rng"][n]))}
        wanted = attention(**one, return_lse=True)
        np.testing.assert_array_equal(o[n], wanted[0])
        of = attention_backward(do[n], o=wanted[0], lse=wanted[1], **one)
        np.testing.assert_array_equal(dq[n], of.dq)
        np.testing.assert_array_equal(dv[n], of.dv)


def test_results_that_are_there_already() -> None:
    given = arrays((), 2, {})
    out = np.full((2, 3, 5, 8), np.nan, np.float32)
    o, lse = engine.forward("{}", given, out=out)
    assert o is out
    do, into = random(2, 3, 5, 8), tuple(np.full_like(given[n], np.nan) for n in "vq")
    found = engine.backward("{}", ("v", "q"), given | {"o": o, "lse": lse, "do": do}, out=into)
    assert all(x is y and np.isfinite(x).all() for x, y in zip(found, into, strict=True))


def test_options_as_text() -> None:
    def halved(score: Any, *at: Any) -> Any:
        return score / 2

    options = {
        "causal": np.True_, "window": (np.int64(3), -1), "softcap": math.inf,
        "softmax_scale": np.float32(0.5), "score_mod": halved, "config": {"block_n": 32},
    }  # fmt: skip
    text = engine.encode(engine.plain(options), keep_functions=True)
    assert isinstance(text, str) and text == engine.encode(options, keep_functions=True)
    read = engine._decoded(text)
    assert read == options | {"softmax_scale": 0.5} and read["score_mod"] is halved
    assert read["window"] == (3, -1)
    with pytest.raises(TypeError):
        engine.encode(options)
    with pytest.raises(TypeError):
        engine.encode({"causal": object()})


def test_what_is_split() -> None:
    bias, x = np.ones(3), np.ones(4)
    mods = {"score_mod": "score", "mod_args": {"x": x}}
    split = functools.partial(engine.split, in_kernel=False)
    found, options = split({"bias": bias, "mask": None, "causal": True, **mods})
    assert list(found) == ["bias", "mod_args.x"] and found["mod_args.x"] is x
    assert options == {"causal": True, "score_mod": "score"}
    draw = np.array([1, 2])
    for rng, is_array in ((draw, True), ((1, 2), False), ([1, 2], False)):
        found, options = split({"dropout_p": 0.1, "rng": rng})
        assert (found.get("rng") is rng, options.get("rng") is rng) == (is_array, not is_array)
    assert not engine.has_gradient("rng")
    lists = np.ones((1, 1, 2), np.int32), np.zeros((1, 1, 2, 1), np.int32)
    rule = InKernel("kv_idx > 3", lambda b, h, q_idx, kv_idx, **_: kv_idx > 3)
    sizes = {"seqlen_q": 200, "seqlen_kv": 300, "block": (128, 64)}
    made = BlockMask.from_lists(*lists, **sizes, mask_mod=rule, mod_args={"x": x})
    for in_kernel, mask_mod in ((True, rule.cuda), (False, rule.python)):
        found, options = engine.split({"block_mask": made}, in_kernel=in_kernel)
        names = ["mod_args.x", "block_mask.kv_num_blocks", "block_mask.kv_indices"]
        assert list(found) == names and options["mask_mod"] is mask_mod
        again = engine.joined(found, options)
        assert again.keys() == {"block_mask", "mask_mod", "mod_args"}
        own = again["block_mask"]
        assert (own.seqlens, own.block) == ((200, 300), (128, 64))
        assert own.arrays.keys() == made.arrays.keys()
    assert label("mod_args.x") == "mod_args['x']" and label("bias") == "bias"
    for name in ("out", "gate", "stream"):
        with pytest.raises(ValueError, match=f"^{name}: "):
            split({name: bias})
