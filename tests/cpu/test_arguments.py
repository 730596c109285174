"""Score rules, masks, sinks and packed batches as arguments: what is refused and how, what is done.

On a GPU the arguments are only described, from arrays' specifications, so that all of it runs
anywhere; on NumPy arrays ``attention`` does the work, and the oracle says whether it is right.
"""

from __future__ import annotations

import inspect
import math
import re
import warnings
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from cases_arguments import (
    DV,
    HKV,
    HQ,
    SKV,
    SLOPES,
    SQ,
    B,
    D,
    attention,
    ones,
    operands,
    random,
    refusal,
)
from cases_reference import repeatable
from hypothesis import given
from hypothesis import strategies as st

import flashcore_cupy
from flashcore_cupy.attention import plan
from flashcore_cupy.cpu import reference
from flashcore_cupy.problem import values
from flashcore_cupy.problem.array_spec import ArraySpec, spec_of
from flashcore_cupy.problem.attention_problem import describe
from flashcore_cupy.problem.blocks import ScoreShape
from flashcore_cupy.problem.mods import MAX_MOD_ARGS, MOD_TYPES, Mods
from flashcore_cupy.problem.request import ARGUMENTS
from flashcore_cupy.problem.rule import Broadcast
from flashcore_cupy.problem.rules import NO_RULES, Rules, describe_rules

SCORES = ScoreShape(B, HQ, SQ, SKV)
DTYPES = (np.float16, ml_dtypes.bfloat16, np.float32)


def through_attention(**arguments: Any) -> Any:
    return attention(*operands(), **arguments)


def through_rules(**arguments: Any) -> Rules:
    """As on a GPU: arrays by their specifications."""
    for name, x in arguments.items():
        if isinstance(x, np.ndarray):
            arguments[name] = spec_of(x)
    return describe_rules(SCORES, "float16", **arguments)


# --- arguments that are wrong wherever the arrays are --------------------------------------------

BAD_RULES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "window of one side": ({"window": (3,)}, ValueError, "window: got (3,); use (left, right)"),
    "window as a number": ({"window": 3}, ValueError, "window: got 3"),
    "no window": ({"window": None}, ValueError, "window: got None"),
    "window of fractions": ({"window": (0.5, 1)}, ValueError, "window: got (0.5, 1)"),
    "window of truths": ({"window": (True, 0)}, ValueError, "window: got (True, 0)"),
    "window below -1": ({"window": (4, -2)}, ValueError, "window: got (4, -2)"),
    "window as text": ({"window": "ab"}, ValueError, "window: got 'ab'"),
    "negative softcap": ({"softcap": -1.0}, ValueError, "softcap: got -1.0"),
    "NaN for softcap": ({"softcap": math.nan}, ValueError, "softcap: got nan"),
    "endlessly negative softcap": ({"softcap": -(10**5000)}, ValueError, "softcap: got int;"),
    "softcap as text": ({"softcap": "30"}, TypeError, "softcap: got str"),
    "softcap None": ({"softcap": None}, TypeError, "softcap: got NoneType; use a number"),
    "softcap True": ({"softcap": True}, TypeError, "softcap: got bool"),
    "softcap in a list": ({"softcap": [30.0]}, TypeError, "softcap: got list"),
    "slopes of too few heads": (
        {"alibi_slopes": ones(3)},
        ValueError,
        "alibi_slopes: got shape (3,); use (Hq,) = (4,) or (B, Hq) = (2, 4)",
    ),
    "slopes of one batch": ({"alibi_slopes": ones(1, HQ)}, ValueError, "got shape (1, 4)"),
    "slopes of truths": (
        {"alibi_slopes": ones(HQ, dtype=bool)},
        TypeError,
        "alibi_slopes: got dtype bool; use float32",
    ),
    "bias of another length": (
        {"bias": ones(SQ, SKV - 1)},
        ValueError,
        "bias: got shape (9, 13), which does not broadcast to (B, Hq, Sq, Skv) = (2, 4, 9, 14)",
    ),
    "bias of key heads": ({"bias": ones(1, HKV, 1, SKV)}, ValueError, "bias: got shape (1, 2"),
    "bias of five axes": ({"bias": ones(1, 1, 1, SQ, SKV)}, ValueError, "bias: got shape (1, 1"),
    "bias in float64": (
        {"bias": ones(SQ, SKV, dtype=np.float64)},
        TypeError,
        "bias: got dtype float64; use q's, float16, or float32",
    ),
    "bias in the other 16 bits": (
        {"bias": ones(SQ, SKV, dtype=ml_dtypes.bfloat16)},
        TypeError,
        "bias: got dtype bfloat16",
    ),
    "bias of truths": ({"bias": ones(SKV, dtype=bool)}, TypeError, "bias: got dtype bool"),
    "mask of another length": (
        {"mask": ones(SQ + 1, SKV, dtype=bool)},
        ValueError,
        "mask: got shape (10, 14), which does not broadcast",
    ),
    "mask of integers": (
        {"mask": ones(SQ, SKV, dtype=np.int32)},
        TypeError,
        "mask: got dtype int32; use bool, True where a query attends",
    ),
    "sink per batch": ({"sink": ones(B, HQ)}, ValueError, "sink: got shape (2, 4); use (Hq,)"),
    "sink of key heads": ({"sink": ones(HKV)}, ValueError, "sink: got shape (2,)"),
    "complex sink": (
        {"sink": ones(HQ, dtype=np.complex64)},
        TypeError,
        "sink: got dtype complex64; use float32",
    ),
    "mod_args without a mod": (
        {"mod_args": {"x": ones(3)}},
        ValueError,
        "mod_args: given without a score_mod or a mask_mod",
    ),
    "mod_args in a list": ({"mod_args": [ones(3)]}, TypeError, "mod_args: got list; use a dict"),
}


@pytest.mark.parametrize("through", [through_attention, through_rules])
@pytest.mark.parametrize("name", BAD_RULES)
def test_bad_rules_are_named(name: str, through: Callable[..., Any]) -> None:
    arguments, error, message = BAD_RULES[name]
    assert message in refusal(error, lambda: through(**arguments))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("not a name", "got the name 'not a name'; use an identifier of C++"),
        ("größe", "got the name 'größe'"),
        ("", "got the name ''"),
        (3, "got the name 3"),
        ("score", "the name 'score' is taken"),
        ("kv_idx", "the name 'kv_idx' is taken"),
        ("default", "the name 'default' is taken"),
        ("int", "the name 'int' is taken"),
        ("args", "the name 'args' is taken"),
    ],
)
def test_bad_names_of_mod_args(name: Any, message: str) -> None:
    on_numpy = refusal(
        ValueError,
        lambda: through_attention(mod_args={name: ones(3)}, score_mod=lambda s, *at, **x: s),
    )
    on_gpu = refusal(
        ValueError, lambda: through_rules(mod_args={name: spec_of(ones(3))}, score_mod="score")
    )
    assert message in on_numpy and on_numpy == on_gpu and on_gpu.startswith("mod_args: ")


# --- where the arrays are decides -----------------------------------------------------------------

BAD_ON_NUMPY: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "score_mod in CUDA": (
        {"score_mod": "score + 1"},
        TypeError,
        "score_mod: got str; on NumPy arrays pass a callable, "
        "score_mod(score, b, h, q_idx, kv_idx, **mod_args)",
    ),
    "mask_mod in CUDA": (
        {"mask_mod": "true"},
        TypeError,
        "mask_mod: got str; on NumPy arrays pass a callable, mask_mod(b, h, q_idx",
    ),
    "score_mod of another kind": ({"score_mod": 3}, TypeError, "score_mod: got int"),
    "mod_args that is no array": (
        {"score_mod": lambda s, *at, x: s + x, "mod_args": {"x": 3}},
        TypeError,
        "mod_args['x']: got int",
    ),
    "slopes as a number": ({"alibi_slopes": 1.0}, TypeError, "alibi_slopes: got float"),
    "slopes of too few heads in a list": (
        {"alibi_slopes": [1.0] * 3},
        ValueError,
        "alibi_slopes: got shape (3,); use (Hq,)",
    ),
    "slopes of truths in a list": (
        {"alibi_slopes": [True] * HQ},
        TypeError,
        "alibi_slopes: got dtype bool; use float32",
    ),
    "slopes as text in a list": ({"alibi_slopes": ["1"] * HQ}, TypeError, "got dtype str"),
    "slopes of unequal rows": (
        {"alibi_slopes": [[1.0], [1.0, 2.0]]},
        TypeError,
        "alibi_slopes: got a list that is no array of numbers",
    ),
    "bias as a number": ({"bias": 1.0}, TypeError, "bias: got float"),
    "mask True": ({"mask": True}, TypeError, "mask: got bool; use a CuPy array"),
    "complex sink in a tuple": ({"sink": (1j,) * HQ}, TypeError, "sink: got dtype complex128"),
    "sink of nothing in a list": ({"sink": [None] * HQ}, TypeError, "sink: got dtype object"),
    "batch_invariant 1": ({"batch_invariant": 1}, TypeError, "batch_invariant: got 1"),
    "batch_invariant in a list": ({"batch_invariant": []}, TypeError, "batch_invariant: got []"),
    "shape of a score_mod": (
        {"score_mod": lambda s, *at: s[:, 1:]},
        ValueError,
        "score_mod: returned shape (9, 13)",
    ),
    "type of a mask_mod": (
        {"mask_mod": lambda b, h, i, j: i - j},
        TypeError,
        "mask_mod: returned ndarray of shape (9, 14), dtype int64; return booleans",
    ),
    "LSE of a gate": ({"gate": "softmax", "return_lse": True}, ValueError, "return_lse: gate"),
}


@pytest.mark.parametrize("name", BAD_ON_NUMPY)
def test_bad_arguments_with_numpy_arrays(name: str) -> None:
    arguments, error, message = BAD_ON_NUMPY[name]
    assert message in refusal(error, lambda: through_attention(**arguments))


def _turned(*shape: int) -> ArraySpec:
    return spec_of(np.empty(shape[::-1], np.float32).T)


BAD_ON_A_GPU: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a function for score_mod": (
        {"score_mod": lambda s, *at: s},
        TypeError,
        "score_mod: got a Python function; on a GPU use a CUDA expression as a string",
    ),
    "a function for mask_mod": (
        {"mask_mod": lambda *at: True},
        TypeError,
        "mask_mod: got a Python function; on a GPU use a CUDA expression as a string, for example "
        "'kv_idx % 2 == 0'",
    ),
    "a number for score_mod": ({"score_mod": 3}, TypeError, "score_mod: got 3"),
    "an empty score_mod": ({"score_mod": ""}, TypeError, "score_mod: got ''"),
    "a blank mask_mod": ({"mask_mod": " \n"}, TypeError, "mask_mod: got ' \\n'"),
    "too many mod_args": (
        {"score_mod": "score", "mod_args": {f"x{i}": spec_of(ones(3)) for i in range(9)}},
        ValueError,
        "mod_args: got 9 arrays; at most 8",
    ),
    "float64 in mod_args": (
        {"score_mod": "score", "mod_args": {"x": spec_of(ones(3, dtype=np.float64))}},
        TypeError,
        "mod_args: x has dtype float64; use one of float16, bfloat16, float32, bool",
    ),
    "mod_args in Fortran's order": (
        {"score_mod": "score", "mod_args": {"x": _turned(3, 4)}},
        ValueError,
        "mod_args: x is not C-contiguous (strides (4, 12) bytes)",
    ),
    "mod_args of every other element": (
        {"mask_mod": "true", "mod_args": {"x": spec_of(ones(8)[::2])}},
        ValueError,
        "mod_args: x is not C-contiguous (strides (8,) bytes)",
    ),
    "mod_args without elements": (
        {"score_mod": "score", "mod_args": {"x": spec_of(ones(0, 3))}},
        ValueError,
        "mod_args: x has no elements",
    ),
    "a bias of a packed batch": (
        {"bias": ones(1, 1), "packed": True},
        ValueError,
        "bias: not with cu_seqlens, whose sequences have no common shape; use score_mod",
    ),
    "a mask of a packed batch": (
        {"mask": ones(1, 1, dtype=bool), "packed": True},
        ValueError,
        "mask: not with cu_seqlens, whose sequences have no common shape; use mask_mod",
    ),
}


@pytest.mark.parametrize("name", BAD_ON_A_GPU)
def test_bad_arguments_with_arrays_on_a_gpu(name: str) -> None:
    arguments, error, message = BAD_ON_A_GPU[name]
    assert message in refusal(error, lambda: through_rules(**arguments))


# --- what is described ----------------------------------------------------------------------------


def test_no_rules_are_no_rules() -> None:
    assert through_rules() == NO_RULES == Rules()
    assert through_rules(window=[-1, -1], softcap=0, mod_args={}) == NO_RULES
    assert not NO_RULES.names


def test_rules_as_kernels_get_them() -> None:
    slopes, bias = random(B, HQ), random(B, 1, SQ, SKV, dtype=np.float16)
    mask = np.ones((HQ, 1, SKV), bool)
    found = through_rules(
        window=(np.int64(3), 2**40),
        softcap=np.float32(30),
        alibi_slopes=slopes[:, ::-1],
        bias=bias,
        mask=mask,
        sink=random(HQ),
        score_mod="score * x[h]",
        mod_args={"x": spec_of(random(HQ)), "n": spec_of(np.ones((2, 1, 3), np.int64))},
    )
    assert found == Rules(
        window=(3, -1),
        softcap=30.0,
        alibi_slopes=(HQ, -1),
        bias=Broadcast("float16", (SQ * SKV, 0, SKV, 1), True),
        mask=Broadcast("bool", (0, SKV, 0, 1), True),
        sink=True,
        mods=Mods("score * x[h]", None, (("x", "float32"), ("n", "int64"))),
    )
    names = ("softcap", "alibi_slopes", "bias", "score_mod", "mask", "sink")
    assert found.names == names
    assert through_rules(alibi_slopes=slopes[0]).alibi_slopes == (0, 1)
    assert hash(found) != hash(NO_RULES)


def _view(draw: Any) -> tuple[np.ndarray, tuple[int, ...]]:
    """A view, of some strides and at some address, that broadcasts to the scores."""
    full = draw(st.tuples(*(st.integers(1, 4) for _ in range(3)), st.integers(1, 6)))
    axes = draw(st.integers(0, 4))
    kept = draw(st.lists(st.booleans(), min_size=axes, max_size=axes))
    shape = tuple(n if keep else 1 for n, keep in zip(full[4 - axes :], kept, strict=True))
    order = draw(st.permutations(range(axes)))
    pads = draw(st.lists(st.integers(0, 2), min_size=axes, max_size=axes))
    dtype = draw(st.sampled_from((np.float16, np.float32)))
    buffer = np.zeros([shape[i] + pads[i] for i in order], dtype)
    first = draw(st.integers(0, 3))
    memory = np.arange(buffer.size + first).astype(dtype)[first:].reshape(buffer.shape)
    turned = memory.transpose(np.argsort(order)) if axes else memory
    return turned[(*(slice(n) for n in shape), ...)], full


@repeatable
@given(st.data())
def test_a_broadcast_is_read_where_it_is(data: Any) -> None:
    x, full = _view(data.draw)
    rules = describe_rules(ScoreShape(*full), "float16", bias=spec_of(x))
    assert rules.bias is not None and rules.bias.dtype == x.dtype.name
    strides = [x.itemsize * n for n in rules.bias.strides]
    read = np.lib.stride_tricks.as_strided(x, full, strides)
    np.testing.assert_array_equal(read, np.broadcast_to(x, full))
    if rules.bias.pairs:  # then any two keys from an even one on lie side by side, aligned
        address = spec_of(x).address
        rows = [address + sum(np.multiply(at, strides[:3])) for at in np.ndindex(*full[:3])]
        assert full[3] % 2 == 0 and strides[3] == x.itemsize
        assert all(row % (2 * x.itemsize) == 0 for row in rows)


@pytest.mark.parametrize(
    ("bias", "pairs"),
    [
        (ones(SQ, SKV), True),
        (ones(SKV), True),
        (ones(SQ, 1), False),
        (ones(SQ, SKV + 1)[:, 1:], False),
        (ones(SQ, SKV + 1)[:, :-1], False),  # every other row begins between two pairs
        (ones(SQ, SKV + 2)[:, 2:], True),
        (ones(SQ, 2 * SKV)[:, ::2], False),
        (ones(SKV, SQ).T, False),
    ],
)
def test_pairs_of_a_bias_are_taken_where_they_are(bias: np.ndarray, pairs: bool) -> None:
    rules = through_rules(bias=bias)
    assert rules.bias is not None and rules.bias.pairs == pairs


@pytest.mark.parametrize(
    ("shape", "view", "chunks"),
    [
        ((4, 32), np.s_[:, :], True),
        ((32,), np.s_[:], True),
        ((4, 48), np.s_[:, 16:], True),
        ((4, 48), np.s_[:, 8:40], False),
        ((4, 40), np.s_[:, :32], False),  # every other row begins in the middle of a chunk
        ((4, 64), np.s_[:, ::2], False),
        ((4, 1), np.s_[:, :], False),
    ],
)
def test_chunks_of_a_mask_are_taken_where_they_are(shape: Any, view: Any, chunks: bool) -> None:
    room = np.ones(math.prod(shape) + 15, bool)
    room = room[-room.ctypes.data % 16 :][: math.prod(shape)].reshape(shape)
    rules = describe_rules(ScoreShape(1, 1, 4, 32), "float16", mask=spec_of(room[view]))
    assert rules.mask is not None and rules.mask.chunks == chunks


def test_a_length_that_is_no_multiple_of_16_has_no_chunks() -> None:
    rules = describe_rules(ScoreShape(1, 1, 4, 24), "float16", mask=spec_of(ones(24, dtype=bool)))
    assert rules.mask is not None and rules.mask.pairs and not rules.mask.chunks


def test_an_odd_number_of_keys_has_no_pairs() -> None:
    """The row's last pair would end in the next row, or outside."""
    rules = describe_rules(ScoreShape(1, 1, 4, 7), "float16", mask=spec_of(ones(7, dtype=bool)))
    assert rules.mask is not None and not rules.mask.pairs


def test_every_dtype_of_mod_args_has_a_name_in_kernels() -> None:
    args = {
        f"of_{name}": spec_of(np.empty(3, ml_dtypes.bfloat16 if name == "bfloat16" else name))
        for name in MOD_TYPES
    }
    assert len(args) == MAX_MOD_ARGS + 1
    for left_out in args:
        chosen = {name: x for name, x in args.items() if name != left_out}
        mods = through_rules(mask_mod="true", mod_args=chosen).mods
        assert mods is not None and len(mods.args) == MAX_MOD_ARGS
        header = mods.header()
        for index, (name, dtype) in enumerate(mods.args):
            declared = f"const ModArray<{MOD_TYPES[dtype]}> {name} = "
            place = f"{{static_cast<const {MOD_TYPES[dtype]}*>(args[{index}])}};"
            assert header.count(declared + place) == 2  # in score_mod and in mask_mod


# --- packed batches: where sequences start --------------------------------------------------------

CU_Q, CU_K = np.array([0, 3, 3, 9], np.int32), np.array([0, 8, 10, 14], np.int32)


def packed_operands(dtype: Any = np.float16) -> list[np.ndarray]:
    """q (total_q, Hq, D), k (total_k, Hkv, D), v (total_k, Hkv, Dv)."""
    shapes = (CU_Q[-1], HQ, D), (CU_K[-1], HKV, D), (CU_K[-1], HKV, DV)
    return [random(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes)]


BAD_PACKED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no keys' boundaries": (
        {"cu_seqlens_k": None},
        ValueError,
        "cu_seqlens_k: missing beside cu_seqlens_q; give both, or neither",
    ),
    "no queries' boundaries": (
        {"cu_seqlens_q": None},
        ValueError,
        "cu_seqlens_q: missing beside cu_seqlens_k",
    ),
    "not from 0": (
        {"cu_seqlens_q": [1, 3, 3, 9]},
        ValueError,
        "cu_seqlens_q: got [1, 3, 3, 9]; it starts with 0, never decreases, and ends with the 9 "
        "rows that are packed",
    ),
    "decreasing": ({"cu_seqlens_k": [0, 10, 8, 14]}, ValueError, "cu_seqlens_k: got [ 0, 10,"),
    "too short a total": ({"cu_seqlens_q": [0, 3, 3, 8]}, ValueError, "the 9 rows that are"),
    "too long a total": ({"cu_seqlens_k": [0, 8, 10, 15]}, ValueError, "the 14 rows that are"),
    "too long for 32 bits": (
        {"cu_seqlens_q": [0, 3, 3, 2**32 + 9]},
        ValueError,
        "the 9 rows that are packed",
    ),
    "other sequences": (
        {"cu_seqlens_k": [0, 8, 14]},
        ValueError,
        "cu_seqlens_k: got 3 boundaries, but cu_seqlens_q has 4",
    ),
    "fractions": (
        {"cu_seqlens_q": CU_Q.astype(np.float32)},
        TypeError,
        "cu_seqlens_q: got dtype float32; use integers",
    ),
    "truths": ({"cu_seqlens_q": np.zeros(4, bool)}, TypeError, "cu_seqlens_q: got dtype bool"),
    "lengths per row": ({"cu_seqlens_q": CU_Q[None]}, ValueError, "got shape (1, 4); use (B + 1,)"),
    "no boundary at all": ({"cu_seqlens_q": []}, ValueError, "got shape (0,); use (B + 1,)"),
    "rows of unequal lengths": (
        {"cu_seqlens_q": [[0], [3, 9]]},
        ValueError,
        "cu_seqlens_q: got [[0], [3, 9]]",
    ),
    "a number": ({"cu_seqlens_k": 14}, TypeError, "cu_seqlens_k: got int"),
    "a gate": ({"gate": "qk"}, ValueError, "gate: got 'qk' with cu_seqlens"),
    "a bias": (
        {"bias": ones(1, 1)},
        ValueError,
        "bias: not with cu_seqlens, whose sequences have no common shape; use score_mod",
    ),
    "a mask": (
        {"mask": ones(1, 1, dtype=bool)},
        ValueError,
        "mask: not with cu_seqlens, whose sequences have no common shape; use mask_mod",
    ),
    "slopes of other sequences": (
        {"alibi_slopes": ones(4, HQ)},
        ValueError,
        "alibi_slopes: got shape (4, 4); use (Hq,) = (4,) or (B, Hq) = (3, 4)",
    ),
    "the shape of out": (
        {"out": np.empty((1, HQ, 9, DV), np.float16)},
        ValueError,
        "out: got shape (1, 4, 9, 8); this problem's is (9, 4, 8)",
    ),
}


@pytest.mark.parametrize("name", BAD_PACKED)
def test_bad_packed_batches_are_named(name: str) -> None:
    arguments, error, message = BAD_PACKED[name]
    given = {"cu_seqlens_q": CU_Q, "cu_seqlens_k": CU_K} | arguments
    assert message in refusal(error, lambda: attention(*packed_operands(), **given))


def test_packed_batches_have_three_axes_and_others_four() -> None:
    both = {"cu_seqlens_q": [0, B], "cu_seqlens_k": [0, B]}
    message = refusal(ValueError, lambda: attention(*operands(), **both))
    assert "q: got 4 dimensions" in message
    assert "a packed batch (cu_seqlens) takes 3: (total, H, D)" in message
    message = refusal(ValueError, lambda: attention(*packed_operands()))
    assert "q: got 3 dimensions" in message and "takes 4: (B, H, S, D)" in message
    number = np.zeros((), np.float16)
    assert "q: got 0 dimensions" in refusal(ValueError, lambda: attention(number, number, number))


def test_boundaries_on_a_gpu_for_arrays_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody looks at those, so no check could keep a cut inside the arrays."""
    from flashcore_cupy.problem import varlen

    elsewhere = type("ndarray", (), {"__module__": "cupy", "__len__": lambda _: 4})()
    monkeypatch.setattr(varlen, "boundaries", lambda *_: (CU_Q, elsewhere))
    both = {"cu_seqlens_q": CU_Q, "cu_seqlens_k": elsewhere}
    message = refusal(TypeError, lambda: attention(*packed_operands(), **both))
    assert message.startswith("cu_seqlens_k: a CuPy array while q is a NumPy array")


# --- what attention() makes of them on NumPy arrays -----------------------------------------------


def _shifted(score: Any, b: int, h: int, i: Any, j: Any, x: Any) -> Any:
    return score * (1 + h) - 0.1 * abs(i - j) + x[b]


def _every_third(b: int, h: int, i: Any, j: Any, x: Any) -> Any:
    return (i + j + b + h) % 3 != 0


RULES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "scale": {"softmax_scale": -0.7},
    "causal": {"causal": True},
    "top-left": {"causal": "top-left"},
    "window": {"window": (3, 2)},
    "causal window": {"window": [4, -1], "causal": "top-left"},
    "softcap": {"softcap": 0.5},
    "slopes": {"alibi_slopes": random(HQ)},
    "slopes per batch": {"alibi_slopes": random(B, HQ), "causal": "top-left"},
    "bias": {"bias": random(B, HQ, SQ, SKV)},
    "bias of the heads": {"bias": random(HQ, 1, 1)},
    "mask": {"mask": random(B, 1, SQ, SKV) > 0},
    "mask of the keys": {"mask": random(SKV) > 0},
    "sink": {"sink": random(HQ)},
    "score_mod": {"score_mod": _shifted, "mod_args": {"x": random(3)}},
    "mask_mod": {"mask_mod": _every_third, "mod_args": {"x": random(3)}},
}
TOGETHER: dict[str, Any] = {}
for one in RULES.values():
    TOGETHER |= one
RULES["together"] = TOGETHER


def judge(got: np.ndarray, expected: Any, naive: Any) -> None:
    comparison = reference.compare(got, expected, naive)
    assert comparison.ok, comparison.reason


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("name", RULES)
def test_rules_on_numpy_arrays(name: str, layout: Any) -> None:
    rules = RULES[name]
    for dtype in DTYPES:
        q, k, v = operands(dtype)
        expected, expected_lse = reference.oracle(q, k, v, **rules)
        naive = reference.naive(q, k, v, **rules)
        axes = (0, 1, 2, 3) if layout == "bhsd" else (0, 2, 1, 3)
        given = [x.transpose(axes) for x in (q, k, v)]
        kept = [x.copy() for x in given]
        o, lse = attention(*given, layout=layout, return_lse=True, **rules)
        assert o.dtype == dtype and lse.dtype == np.float32
        judge(o.transpose(axes), expected, naive)
        np.testing.assert_allclose(lse, expected_lse, atol=1e-4)
        for x, before in zip(given, kept, strict=True):
            np.testing.assert_array_equal(x, before)
        around = np.full((*o.shape[:-1], DV + 3), np.nan, dtype)
        out = around[..., 1 : 1 + DV]
        assert attention(*given, layout=layout, out=out, **rules) is out
        np.testing.assert_array_equal(out, o)
        assert np.isnan(around[..., 0]).all() and np.isnan(around[..., 1 + DV :]).all()


@pytest.mark.parametrize("gate", ["qk", "softmax", "pv"])
@pytest.mark.parametrize("name", RULES)
def test_gates_with_rules_on_numpy_arrays(name: str, gate: Any) -> None:
    q, k, v = operands(np.float32)
    rules = RULES[name]
    stage = {
        "qk": reference.gate_scores,
        "softmax": reference.gate_probabilities,
        "pv": reference.gate_uniform,
    }[gate]
    got, expected = attention(q, k, v, gate=gate, **rules), stage(q, k, v, **rules)
    assert got.shape == expected.shape and got.dtype == np.float32
    np.testing.assert_array_equal(np.isneginf(got), np.isneginf(expected))
    seen = np.isfinite(expected)
    np.testing.assert_allclose(got[seen], expected[seen], atol=2e-5)


PACKED_RULES = {
    name: rules
    for name, rules in RULES.items()
    if not rules.keys() & {"bias", "mask"} and name != "slopes per batch"
} | {"slopes per batch": {"alibi_slopes": random(3, HQ)}}


@pytest.mark.parametrize("name", PACKED_RULES)
def test_packed_batches_on_numpy_arrays(name: str) -> None:
    rules, both = PACKED_RULES[name], {"cu_seqlens_q": CU_Q, "cu_seqlens_k": CU_K}
    for dtype in DTYPES:
        q, k, v = packed_operands(dtype)
        expected, expected_lse = reference.oracle_varlen(q, k, v, CU_Q, CU_K, **rules)
        naive = reference.naive_varlen(q, k, v, CU_Q, CU_K, **rules)
        o, lse = attention(q, k, v, return_lse=True, **both, **rules)
        assert o.shape == (9, HQ, DV) and o.dtype == dtype and lse.shape == (HQ, 9)
        judge(o, expected, naive)
        np.testing.assert_allclose(lse, expected_lse, atol=1e-4)
        out = np.full_like(o, np.nan)
        assert attention(q, k, v, out=out, **both, **rules) is out
        np.testing.assert_array_equal(out, o)


def test_a_packed_sequence_is_what_it_is_alone() -> None:
    """The same bits, whatever its neighbours hold; its number is the b of the rules."""
    q, k, v = packed_operands(np.float32)
    rules: dict[str, Any] = {"causal": True, "softcap": 3.0, "sink": random(HQ)}
    seen: set[int] = set()

    def by_sequence(score: Any, b: int, h: int, i: Any, j: Any) -> Any:
        seen.add(b)
        assert i.min() == 0 and j.min() == 0 and i.max() < 6 and j.max() < 8
        return score * (1 + b)

    o, lse = attention(
        *(q, k, v),
        cu_seqlens_q=CU_Q.tolist(),
        cu_seqlens_k=CU_K.astype(np.int64),
        score_mod=by_sequence,
        return_lse=True,
        **rules,
    )
    assert seen == {0, 2}  # the sequence between them has no queries
    for n, (rows, keys) in enumerate(zip(pairwise(CU_Q), pairwise(CU_K), strict=True)):
        alone = [
            x[slice(*ends)].swapaxes(0, 1)[None] for x, ends in ((q, rows), (k, keys), (v, keys))
        ]
        own_o, own_lse = attention(
            *alone, score_mod=lambda s, *at, n=n: s * (1 + n), return_lse=True, **rules
        )
        np.testing.assert_array_equal(o[slice(*rows)], own_o[0].swapaxes(0, 1))
        np.testing.assert_array_equal(lse[:, slice(*rows)], own_lse[0])


def test_sequences_without_rows_or_keys() -> None:
    q, k, v = packed_operands()
    o, lse = attention(
        q, k, v, cu_seqlens_q=[0, 0, 5, 9], cu_seqlens_k=[0, 14, 14, 14], return_lse=True
    )
    assert (o == 0).all() and (lse == -np.inf).all()  # no sequence has both
    sink = random(HQ)
    both = {"cu_seqlens_q": [0, 0, 5, 9], "cu_seqlens_k": [0, 14, 14, 14]}
    o, lse = attention(q, k, v, sink=sink, return_lse=True, **both)
    assert (o == 0).all()
    np.testing.assert_array_equal(lse, np.repeat(sink[:, None], 9, 1))
    nothing = [x[:0] for x in (q, k, v)]
    o, lse = attention(*nothing, cu_seqlens_q=[0], cu_seqlens_k=[0], return_lse=True)
    assert o.shape == (0, HQ, DV) and lse.shape == (HQ, 0)


def test_packed_problems_know_their_totals() -> None:
    q, k, v = packed_operands()
    problem = describe(q, k, v, sequences=3, causal=True)
    assert (problem.batch, problem.heads_q, problem.heads_kv) == (3, HQ, HKV)
    assert (problem.seqlen_q, problem.seqlen_kv) == (9, 14) and problem.packed
    assert problem.visible_kv == 14, "what a query sees, only the boundaries tell"
    assert problem.output_shape == (9, HQ, DV) and problem.lse_shape == (HQ, 9)
    assert problem.q.strides == (0, D, HQ * D)
    with pytest.raises(ValueError, match="lengths of packed sequences"):
        _ = problem.flops


def test_explain_checks_rules_too() -> None:
    assert "CPU" in flashcore_cupy.explain(*operands(), **RULES["together"])
    with pytest.raises(ValueError, match="window: got 3"):
        flashcore_cupy.explain(*operands(), window=3)
    both: dict[str, Any] = {"cu_seqlens_q": CU_Q, "cu_seqlens_k": CU_K}
    assert "CPU" in flashcore_cupy.explain(*packed_operands(), **both)


# --- names that other libraries use ---------------------------------------------------------------

NAMES = {
    "scale": "scale': use softmax_scale",
    "sm_scale": "use softmax_scale",
    "softmax_scael": "use softmax_scale",
    "is_causal": "use causal (True is aligned at the bottom right, 'top-left' as torch's)",
    "casual": "use causal",
    "attn_mask": "use mask (boolean, True where a query attends) or bias (added to the scores)",
    "attn_bias": "use bias",
    "dropout": ": use dropout_p",
    "p_dropout": ": use dropout_p",
    "window_size": "use window",
    "deterministic": "; leave it out: the same call always gives the same bits",
    "enable_gqa": "; leave it out: k and v may have fewer heads than q",
    "return_softmax_lse": "use return_lse",
    "cu_seqlens_kv": "use cu_seqlens_k",
    "cu_seqlen_q": "use cu_seqlens_q",
    "zzz": "has no argument 'zzz'",
}


@pytest.mark.parametrize("function", ["attention", "explain", "plan"])
@pytest.mark.parametrize("name", NAMES)
def test_unknown_names_are_told_ours(name: str, function: str) -> None:
    call = {"attention": attention, "explain": flashcore_cupy.explain, "plan": plan}[function]
    if function == "plan":
        pytest.importorskip("cupy")
    message = refusal(TypeError, lambda: call(*operands(), **{name: None}))
    assert message.startswith(f"{function}() has no argument {name!r}")
    assert message.endswith(NAMES[name])


def test_every_name_that_a_hint_gives_is_taken() -> None:
    for hint in values._ELSEWHERE.values():
        if not hint.startswith("nothing: "):
            assert re.match(r"\w+", hint)[0] in ARGUMENTS  # type: ignore[index]
    assert not set(values._ELSEWHERE) & set(ARGUMENTS)
    taken = inspect.signature(attention).parameters
    assert set(ARGUMENTS) == {name for name in taken if name != "unknown"}


# --- flags, numbers, and what stands for them -----------------------------------------------------


def test_flags_of_numpy_are_taken() -> None:
    q, k, v = operands()
    wanted = attention(q, k, v, causal=True, batch_invariant=True, return_lse=True)
    got = attention(q, k, v, causal=np.True_, batch_invariant=np.True_, return_lse=np.True_)
    for x, y in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(x, y)
    plain = attention(q, k, v, causal=np.False_, batch_invariant=np.False_, return_lse=np.False_)
    np.testing.assert_array_equal(plain, attention(q, k, v))


FLAGS = (1, 0, "no", "", None, [], np.array(True), np.ones((2, 2), bool), 1.0)


@pytest.mark.parametrize("flag", FLAGS, ids=repr)
@pytest.mark.parametrize("name", ["return_lse", "batch_invariant", "causal"])
def test_what_is_no_flag_is_refused(name: str, flag: Any) -> None:
    error = ValueError if name == "causal" else TypeError
    for call in (attention, flashcore_cupy.explain):
        message = refusal(error, lambda call=call: call(*operands(), **{name: flag}))
        assert message.startswith(f"{name}: got ") and "True" in message


NUMBERS = (
    *(0.5, np.float64(0.5), np.float32(0.5), np.float16(0.5), ml_dtypes.bfloat16(0.5)),
    *(np.array(0.5), np.array(0.5, ml_dtypes.bfloat16), Fraction(1, 2)),
)


@pytest.mark.parametrize("number", NUMBERS, ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("name", ["softmax_scale", "softcap"])
def test_numbers_of_all_kinds_are_taken(name: str, number: Any) -> None:
    wanted = attention(*operands(), **{name: 0.5})
    np.testing.assert_array_equal(attention(*operands(), **{name: number}), wanted)
    three = np.array(3) if isinstance(number, np.ndarray) else 3
    np.testing.assert_array_equal(
        attention(*operands(), **{name: three}), attention(*operands(), **{name: 3.0})
    )


NO_NUMBERS = (
    *(True, np.True_, np.array(True), "1", b"1", 1j, np.complex64(1), np.array(1j), [1.0]),
    *(np.ones(1), np.ones((2, 2)), np.array("1"), object(), np.datetime64("2020-01-01")),
)


@pytest.mark.parametrize("number", NO_NUMBERS, ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("name", ["softmax_scale", "softcap"])
def test_what_is_no_number_is_refused(name: str, number: Any) -> None:
    message = refusal(TypeError, lambda: through_attention(**{name: number}))
    assert message.startswith(f"{name}: got ") and "; use a number, or " in message


@pytest.mark.parametrize(
    "scale", [math.nan, math.inf, -math.inf, 1e39, 10**400, -(10**5000)], ids=values.shown
)
def test_scales_that_are_not_finite_are_refused(scale: Any) -> None:
    message = refusal(ValueError, lambda: through_attention(softmax_scale=scale))
    assert message.startswith("softmax_scale: got ") and len(message) < 200


def test_what_a_message_shows_is_short() -> None:
    assert values.shown("a\nb") == "'a\\nb'" and values.shown(None) == "None"
    assert values.shown(np.ones((100, 100))) == "ndarray of shape (100, 100)"
    assert len(values.shown("x" * 1000)) < 100
    assert values.shown(10**5000) == "int"

    class Broken:
        shape = property(lambda self: 1 / 0)

        def __repr__(self) -> str:
            raise RuntimeError

    assert values.shown(Broken()) == "Broken"


# --- caps from next to nothing to infinity --------------------------------------------------------


@pytest.mark.parametrize("cap", [math.inf, 3.5e38, 1e300, 10**400, 0, -0.0], ids=values.shown)
def test_caps_that_are_none(cap: Any) -> None:
    assert through_rules(softcap=cap) == NO_RULES
    np.testing.assert_array_equal(through_attention(softcap=cap), through_attention())
    assert reference.oracle(*operands(), softcap=cap)[1].tobytes() == (
        reference.oracle(*operands())[1].tobytes()
    )


@pytest.mark.parametrize("cap", [1e-300, 1e-45, 1e-38, 1e-30, 1e-3, 1.0, 1e8, 1e30, 1e38, 3.4e38])
def test_caps_of_all_sizes(cap: float) -> None:
    """A small one makes all scores alike, a large one leaves them as they are, to the last bit."""
    rules = through_rules(softcap=cap)
    assert rules.names == ("softcap",) and 0 < np.float32(rules.softcap) < np.inf
    assert np.isfinite(np.float32(1) / np.float32(rules.softcap))
    q, k, v = operands(np.float32)
    for factor in (1.0, 1e-6, 1e4):
        with np.errstate(all="raise"):
            scores = attention(q * np.float32(factor), k, v, softcap=cap, gate="qk")
        plain = reference.gate_scores(q * np.float32(factor), k, v)
        expected = cap * np.tanh(plain / cap) if cap > 1e-100 else np.sign(plain) * cap
        np.testing.assert_allclose(scores, expected, rtol=3e-5, atol=max(1e-30, 1e-9 * factor))
        o = attention(q * np.float32(factor), k, v, softcap=cap)
        assert np.isfinite(o).all()
        if cap < 1e-30:
            mean = v.astype(np.float64).mean(2, keepdims=True).repeat(HQ // HKV, 1)
            assert np.abs(o - mean).max() < 1e-6


def test_a_cap_far_above_the_scores_changes_no_bit() -> None:
    q, k, v = operands(np.float32)
    for factor in (1.0, 1e-8):
        small = q * np.float32(factor)
        plain = attention(small, k, v, gate="qk")
        np.testing.assert_array_equal(attention(small, k, v, softcap=1e37, gate="qk"), plain)


KINDS: dict[str, Callable[[np.ndarray], Any]] = {
    "float64": lambda x: x.astype(np.float64),
    "float16": lambda x: x.astype(np.float16),
    "bfloat16": lambda x: x.astype(ml_dtypes.bfloat16),
    "big-endian": lambda x: x.astype(">f4"),
    "long double": lambda x: x.astype(np.longdouble),
    "list": lambda x: x.tolist(),
    "tuple": lambda x: tuple(x),
    "every other one": lambda x: np.repeat(x.astype(np.float64), 2, -1)[..., ::2],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["alibi_slopes", "sink"])
def test_slopes_and_sinks_of_other_kinds(name: str, kind: str) -> None:
    wanted = through_attention(**{name: SLOPES})
    given = KINDS[kind](SLOPES)
    np.testing.assert_array_equal(through_attention(**{name: given}), wanted)
    np.testing.assert_array_equal(
        through_attention(**{name: [1, 2, 3, 4]}),
        through_attention(**{name: np.array([1, 2, 3, 4], np.float32)}),
    )


def test_slopes_per_batch_in_lists_and_numbers_beyond_float32() -> None:
    per_batch = random(B, HQ)
    np.testing.assert_array_equal(
        through_attention(alibi_slopes=per_batch.tolist()),
        through_attention(alibi_slopes=per_batch),
    )
    for sink in ([1e300, 0, 0, 0], np.array([0, -1e39, 0, 0])):
        with np.errstate(all="raise"):
            message = refusal(ValueError, lambda sink=sink: through_attention(sink=sink))
        assert message == "sink: got numbers beyond float32's largest, 3.4e38"
    none = [-math.inf] * HQ  # adds nothing to the denominator
    np.testing.assert_array_equal(through_attention(sink=none), through_attention())


def test_kernels_get_slopes_and_sinks_as_float32() -> None:
    for name in ("alibi_slopes", "sink"):
        message = refusal(
            TypeError, lambda name=name: through_rules(**{name: ones(HQ, dtype=np.float64)})
        )
        assert message == f"{name}: got dtype float64; use float32"


# --- what mods return, take and raise -------------------------------------------------------------


class _Uncallable:
    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        raise RuntimeError("not today")


NO_SCORES: dict[str, tuple[Callable[..., Any], str]] = {
    "nothing": (lambda s, *at: None, "returned None; return the block's new scores, real numbers"),
    "text": (lambda s, *at: "scores", "returned 'scores', dtype str"),
    "complex numbers": (lambda s, *at: s + 1j, "returned ndarray of shape (9, 14), dtype complex"),
    "truths": (lambda s, *at: s > 0, "returned ndarray of shape (9, 14), dtype bool"),
    "objects": (lambda s, *at: s.astype(object), "returned ndarray of shape (9, 14); return"),
    "a masked array": (lambda s, *at: np.ma.masked_array(s, s > 0), "MaskedArray of shape (9, 14)"),
    "unequal rows": (lambda s, *at: [[1.0], [1.0, 2.0]], "returned [[1.0], [1.0, 2.0]]; return"),
    "what cannot be read": (lambda s, *at: _Uncallable(), "_Uncallable"),
    "a function": (lambda s, *at: np.sin, "return the block's new scores"),
}


@pytest.mark.parametrize("name", NO_SCORES)
def test_score_mods_that_return_no_scores(name: str) -> None:
    mod, message = NO_SCORES[name]
    said = refusal(TypeError, lambda: through_attention(score_mod=mod))
    assert said.startswith("score_mod: returned ") and message in said


@pytest.mark.parametrize("shape", [(SQ,), (SQ + 1, SKV), (1, SQ, SKV), (0,)])
def test_score_mods_that_return_another_shape(shape: tuple[int, ...]) -> None:
    said = refusal(ValueError, lambda: through_attention(score_mod=lambda *at: ones(*shape)))
    assert said == f"score_mod: returned shape {shape}; return the block's, {(SQ, SKV)}"


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64, np.int32, np.uint8])
def test_score_mods_return_any_real_numbers(dtype: Any) -> None:
    wanted = through_attention(score_mod=lambda s, *at: 0 * s + 3)
    for result in (np.full((SQ, SKV), 3, dtype), np.full((1, SKV), 3, dtype), 3):
        got = through_attention(score_mod=lambda s, *at, result=result: result)
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("result", [None, 1, "yes", [1, 0], np.ma.masked_array([True], False)])
def test_mask_mods_that_return_no_booleans(result: Any) -> None:
    said = refusal(TypeError, lambda: through_attention(mask_mod=lambda *at: result))
    assert said.startswith("mask_mod: returned ") and "return booleans" in said


@pytest.mark.parametrize("through", [attention, flashcore_cupy.explain])
def test_mods_of_another_signature_are_refused(through: Callable[..., Any]) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"score_mod": lambda s: s}, "score_mod: cannot be called as score_mod(score, b, h, q_idx"),
        ({"mask_mod": lambda b, h, i: True}, "mask_mod: cannot be called as mask_mod(b, h, q_idx"),
        (
            {"score_mod": lambda s, b, h, i, j, y: s, "mod_args": {"x": ones(3)}},
            "missing a required argument: 'y'",
        ),
        (
            {"mask_mod": lambda b, h, i, j: i > j, "mod_args": {"x": ones(3)}},
            "got an unexpected keyword argument 'x'",
        ),
    ]
    for arguments, message in wrong:
        given = refusal(TypeError, lambda given=arguments: through(*operands(), **given))
        assert message in given


@pytest.mark.parametrize("error", [KeyError, ZeroDivisionError, TypeError, ValueError])
def test_what_a_mod_raises_reaches_the_caller(error: type[Exception]) -> None:
    ours = error("of my own")

    def mod(*at: Any) -> Any:
        raise ours

    for name in ("score_mod", "mask_mod"):
        with pytest.raises(error) as caught:
            through_attention(**{name: mod})
        assert caught.value is ours


# --- dtypes, byte orders, dimensions --------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "hint"),
    [
        ("f8", ", for example k.astype('float32')"),
        (np.longdouble, ", for example k.astype('float32')"),
        ("i8", ", for example k.astype('float16')"),
        ("u1", ", for example k.astype('float16')"),
        *((dtype, "") for dtype in ("U3", "S3", "O", "c8", "?", "M8[s]", "V4")),
    ],
)
def test_hints_fit_the_dtype(dtype: Any, hint: str) -> None:
    q, k, v = operands()
    odd = np.zeros(k.shape, dtype)
    message = refusal(TypeError, lambda: attention(q, odd, v))
    assert message.startswith("k: got dtype ")
    assert message.endswith(f"use one of float16, bfloat16, float32{hint}")


def test_byte_orders_are_named() -> None:
    q, k, v = operands(np.float32)
    for name in ("k", "v", "out"):
        given = {"q": q, "k": k, "v": v, "out": np.empty((B, HQ, SQ, DV), np.float32)}
        given[name] = given[name].astype(">f4")
        message = refusal(TypeError, lambda given=given: attention(**given))
        assert message.startswith(f"{name}: got dtype >f4") and "q" in message
        assert "<f4" in message
    other = [x.astype(">f4") for x in (q, k, v)]
    np.testing.assert_array_equal(attention(*other), attention(q, k, v))
    bias = random(SQ, SKV)
    np.testing.assert_array_equal(
        attention(q, k, v, bias=bias.astype(">f4")), attention(q, k, v, bias=bias)
    )


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_packed_arrays_have_three_dimensions_before_anything_else(name: str) -> None:
    given = dict(zip("qkv", packed_operands(), strict=True))
    given[name] = given[name][None]
    bad_bounds = {"cu_seqlens_q": [5, 3], "cu_seqlens_k": None}
    message = refusal(ValueError, lambda: attention(**given, **bad_bounds))
    assert message.startswith(f"{name}: got 4 dimensions")
    assert message.endswith("a packed batch (cu_seqlens) takes 3: (total, H, D)")


class _Frame:
    """A table of pandas, as far as it looks like an array."""

    shape, ndim = (2, 2), 2

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return np.ones((2, 2))


@pytest.mark.parametrize("name", ["q", "k", "v", "bias", "mask", "out"])
@pytest.mark.parametrize(
    "odd",
    [[1.0], (1.0,), "x", b"x", 1.0, True, {}, _Frame(), np.ndarray, object()],
    ids=lambda odd: type(odd).__name__,
)
def test_what_is_no_array_is_refused(name: str, odd: Any) -> None:
    given = dict(zip("qkv", operands(), strict=True)) | {name: odd}
    for call in (attention, flashcore_cupy.explain):
        message = refusal(TypeError, lambda call=call: call(**given))
        assert message.startswith(f"{name}: got {type(odd).__name__}; use a CuPy array")
        convertible = isinstance(odd, list | tuple | float | bool | _Frame)
        assert message.endswith(f"numpy.asarray({name})") == convertible


def test_matrices_are_not_batches() -> None:
    q, k, v = operands()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        matrix = np.matrix(q[0, 0])
    assert "q: got 2 dimensions" in refusal(ValueError, lambda: attention(matrix, k, v))


# --- explain takes, and refuses, what attention does ----------------------------------------------


def test_explain_takes_all_arguments() -> None:
    q, k, v = operands()
    out = np.full((B, HQ, SQ, DV), np.nan, np.float16)
    rules: dict[str, Any] = TOGETHER | {"alibi_slopes": SLOPES.tolist(), "sink": SLOPES.tolist()}
    text = flashcore_cupy.explain(q, k, v, return_lse=True, out=out, **rules)
    assert "CPU" in text and np.isnan(out).all(), "nothing is written"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"return_lse": "no"}, TypeError, "return_lse: got 'no'; use True or False"),
        ({"out": np.empty((1, 2), np.float16)}, ValueError, "out: got shape (1, 2)"),
        ({"out": "x"}, TypeError, "out: got str"),
        ({"stream": 3}, ValueError, "stream: is of a GPU, but q, k, v are NumPy"),
        ({"stream": 3, "kernel": "scalar"}, ValueError, "stream: is of a GPU, but q, k, v are"),
        ({"config": {"block_n": 32}}, ValueError, "config: changes a kernel's tile, but NumPy"),
        ({"kernel": "scalar", "config": {"m": 1}}, ValueError, "config: unknown field 'm'"),
        ({"kernel": "scalar", "sink": [0.0] * HQ}, ValueError, "kernel 'scalar': has no sink"),
        (
            {"kernel": "mma_sm80", "score_mod": lambda s, *_: s},
            TypeError,
            "score_mod: got a Python function, and kernel='mma_sm80' takes a CUDA expression",
        ),
        (
            {"kernel": "mma_sm80", "bias": np.zeros(SKV, ">f4")},
            TypeError,
            "bias: got dtype >f4, which is not in this machine's byte order",
        ),
        ({"gate": "qk", "return_lse": True}, ValueError, "return_lse: gate 'qk' stops before"),
        ({"score_mod": "score + 1"}, TypeError, "score_mod: got str; on NumPy arrays pass"),
        ({"sink": ["a"] * HQ}, TypeError, "sink: got dtype str"),
    ],
)
def test_explain_refuses_what_attention_refuses(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    said = {
        refusal(error, lambda call=call: call(*operands(), **arguments))
        for call in (attention, flashcore_cupy.explain)
    }
    assert len(said) == 1 and said.pop().startswith(message)


def test_out_shares_memory_with_no_array_that_rules_read() -> None:
    q, k, v = operands(np.float32)
    room = np.zeros((B, HQ, SQ, SKV + DV), np.float32)
    out, apart = room[..., :DV], room[..., DV:]
    assert attention(q, k, v, bias=apart, out=out) is out
    sharing: list[tuple[str, dict[str, Any]]] = [
        ("bias", {"bias": room[..., :SKV]}),
        ("sink", {"sink": out[0, :, 0, 0]}),
        ("mod_args['x']", {"mod_args": {"x": out}, "score_mod": lambda s, *at, x: s}),
    ]
    for name, rules in sharing:
        for call in (attention, flashcore_cupy.explain):
            message = refusal(
                ValueError, lambda call=call, rules=rules: call(q, k, v, out=out, **rules)
            )
            assert message == f"out: overlaps {name} in memory; use another array"
