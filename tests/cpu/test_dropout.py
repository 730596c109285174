"""Dropout on NumPy arrays: the generator, the mask, attention under a mask, what is refused."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest
from cases_dropout import RNG, UNIT, key_of, mask, number, philox
from cases_gradients import check as check_gradients
from cases_gradients import operands, random

import flashcore_cupy
from flashcore_cupy import attention, attention_backward, dropout_mask
from flashcore_cupy.cpu import reference
from flashcore_cupy.problem import philox as generator
from flashcore_cupy.problem.attention_problem import contiguous_problem
from flashcore_cupy.problem.rules import NO_RULES, describe_rules
from flashcore_cupy.select import selector

# --- the generator --------------------------------------------------------------------------------

#: Counter, key and words, as the authors' Random123 publishes them in its known answers.
KNOWN = (
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers(counter: Any, key: Any, words: Any) -> None:
    assert philox(counter, key) == words
    arrays = tuple(np.full(1, x, np.uint64) for x in counter)
    whole = np.full(1, key[0] | key[1] << 32, np.uint64)
    assert tuple(int(x[0]) for x in generator.philox(arrays, whole)) == words


@pytest.mark.parametrize("rng", [(0, 0), RNG, (2**64 - 1, 2**64 - 1), (7, 1), (7, 2)])
def test_the_key_is_of_seed_and_offset(rng: tuple[int, int]) -> None:
    assert int(generator.key_of(np.array(rng, np.uint64))[0]) == key_of(*rng)
    assert key_of(rng[0], 0) == rng[0]


def test_offsets_of_a_seed_share_no_key() -> None:
    keys = {key_of(5, offset) for offset in range(10_000)}
    keys |= {key_of(5, 2**64 - 1 - offset) for offset in range(10_000)}
    assert len(keys) == 20_000


# --- the mask -------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("rng", [RNG, (0, 0)])
def test_the_mask_number_by_number(p: float, rng: tuple[int, int]) -> None:
    shape = (2, 3, 37, 53)
    np.testing.assert_array_equal(dropout_mask(shape, p, rng), mask(shape, p, rng))


def test_far_from_the_first_row() -> None:
    """Blocks of queries and of keys that begin anywhere."""
    dropout = generator.Dropout.of(0.5, RNG)
    queries = np.array([2**30 - 1, 5, 13, 12_345])
    keys = slice(2**29 - 21, 2**29 + 9)
    found = dropout.kept(70_000, 300, queries, keys)
    expected = [
        [number(RNG, 70_000, 300, int(i), j) >= UNIT // 2 for j in range(keys.start, keys.stop)]
        for i in queries
    ]
    np.testing.assert_array_equal(found, expected)


def test_an_element_does_not_depend_on_the_shape() -> None:
    whole = dropout_mask((3, 4, 60, 70), 0.3, RNG)
    np.testing.assert_array_equal(dropout_mask((2, 1, 33, 50), 0.3, RNG), whole[:2, :1, :33, :50])


def test_probabilities_are_rounded_to_16_bits() -> None:
    shape = (1, 1, 40, 40)
    assert dropout_mask(shape, 0.0, None).all()
    assert dropout_mask(shape, 2.0**-18, None).all(), "rounded to 0"
    numbers = np.array([number(RNG, *at) for at in np.ndindex(*shape)]).reshape(shape)
    for p, threshold in ((0.25, UNIT // 4), (0.1, 6554), (1 - 2.0**-20, UNIT - 1)):
        np.testing.assert_array_equal(dropout_mask(shape, p, RNG), numbers >= threshold)


@pytest.mark.parametrize("p", [2.0**-16, 0.01, 0.1, 0.5, 0.9])
def test_how_many_are_kept(p: float) -> None:
    kept = dropout_mask((2, 4, 512, 512), p, RNG)
    rounded = round(p * UNIT) / UNIT
    deviation = np.sqrt(kept.size * rounded * (1 - rounded))
    assert abs(kept.sum() - kept.size * (1 - rounded)) < 5 * deviation
    for axis in range(4):  # nor are there rows, columns, heads that keep more
        others = tuple(n for n in range(4) if n != axis)
        count, size = kept.sum(axis=others), kept.size // kept.shape[axis]
        chi = np.square(count - size * (1 - rounded)).sum() / (size * rounded * (1 - rounded))
        assert abs(chi - len(count)) < 6 * np.sqrt(2 * len(count))


def test_words_are_uniform() -> None:
    """Chi-square of each byte of the 16 bits, and of the low one under the high one's bits."""
    dropout = generator.Dropout.of(0.5, RNG)
    for shift, bits in ((0, 8), (8, 8), (4, 8)):
        counts = np.zeros(2**bits)
        for threshold in range(2**bits):
            cut = generator.Dropout(dropout.key, threshold << (16 - bits), np)
            counts[threshold] = cut.kept(0, shift, np.arange(256), slice(0, 256)).sum()
        bins = -np.diff(np.append(counts, 0))
        expected = 256 * 256 / 2**bits
        chi = np.square(bins - expected).sum() / expected
        assert abs(chi - 2**bits) < 6 * np.sqrt(2 * 2**bits)


def test_draws_are_independent() -> None:
    """Any two masks differ as often as chance has it: of places, heads, batches and draws."""
    p, shape = 0.3, (2, 2, 256, 256)
    kept = dropout_mask(shape, p, (7, 0))
    pairs = {
        "next query": (kept[..., :-1, :], kept[..., 1:, :]),
        "8 queries on": (kept[..., :-8, :], kept[..., 8:, :]),
        "next key": (kept[..., :-1], kept[..., 1:]),
        "8 keys on": (kept[..., :-8], kept[..., 8:]),
        "16 queries on": (kept[..., :-16, :], kept[..., 16:, :]),
        "16 keys on": (kept[..., :-16], kept[..., 16:]),
        "transposed": (kept, kept.swapaxes(2, 3)),
        "next head": (kept[:, 0], kept[:, 1]),
        "next batch": (kept[0], kept[1]),
        "next offset": (kept, dropout_mask(shape, p, (7, 1))),
        "next seed": (kept, dropout_mask(shape, p, (8, 0))),
        "seed and offset": (kept, dropout_mask(shape, p, (0, 7))),
    }
    rate = 2 * p * (1 - p)
    for name, (x, y) in pairs.items():
        differ = np.mean(x != y)
        # A pair of elements that both shifted masks have counts twice.
        assert abs(differ - rate) < 6 * np.sqrt(2 * rate * (1 - rate) / x.size), name


# --- attention ------------------------------------------------------------------------------------

SHAPE = (2, 4, 70, 90)


def problem(dtype: Any = np.float32) -> list[np.ndarray]:
    return operands(4, 2, 70, 90, 16, 24, 2, dtype)


@pytest.mark.parametrize("rules", [{}, {"causal": True}, {"window": (20, 9), "softcap": 2.0}])
def test_attention_is_the_masked_softmax(rules: dict[str, Any]) -> None:
    q, k, v = problem()
    p = reference.gate_probabilities(q, k, v, **rules)
    kept = mask(SHAPE, 0.3)
    values = np.repeat(v, 2, axis=1).astype(np.float64)
    expected = (p * kept / (1 - round(0.3 * UNIT) / UNIT)) @ values
    given = {"dropout_p": 0.3, "rng": RNG, **rules}
    exact, lse = reference.oracle(q, k, v, **given)
    np.testing.assert_allclose(exact, expected, atol=1e-14)
    o, found_lse = attention(q, k, v, return_lse=True, **given)
    np.testing.assert_allclose(o, expected, atol=3e-6)
    _, plain_lse = reference.oracle(q, k, v, **rules)
    np.testing.assert_array_equal(lse, plain_lse)
    np.testing.assert_allclose(found_lse, plain_lse, atol=3e-6)


def test_packed_batches_count_from_each_sequence() -> None:
    lengths = ((0, 5), (33, 20), (40, 70), (1, 1))
    starts = [np.cumsum([0, *x]).astype(np.int32) for x in zip(*lengths, strict=True)]
    q = random(starts[0][-1], 4, 16, seed=1)
    k, v = (random(starts[1][-1], 2, 16, seed=n) for n in (2, 3))
    given = {"dropout_p": 0.4, "rng": RNG}
    o = attention(q, k, v, cu_seqlens_q=starts[0], cu_seqlens_k=starts[1], causal=True, **given)
    exact, _ = reference.oracle_varlen(q, k, v, *starts, causal=True, **given)
    np.testing.assert_allclose(o, exact, atol=3e-6)
    kept = dropout_mask((4, 4, 40, 70), 0.4, RNG)
    for n, (rows, keys) in enumerate(lengths):
        at, of = (slice(*x[n : n + 2]) for x in starts)
        one = [x[None].swapaxes(1, 2) for x in (q[at], k[of], v[of])]
        p = reference.gate_probabilities(*one, causal=True) * kept[n, :, :rows, :keys]
        expected = p / (1 - round(0.4 * UNIT) / UNIT) @ np.repeat(one[2], 2, axis=1)
        np.testing.assert_allclose(o[at], expected[0].swapaxes(0, 1), atol=3e-6)


def test_gates() -> None:
    """The softmax's gate shows what dropout gets; gate pv has the mask."""
    q, k, v = problem()
    given = {"dropout_p": 0.3, "rng": RNG}
    for gate in ("qk", "softmax"):
        plain = attention(q, k, v, gate=gate)
        np.testing.assert_array_equal(attention(q, k, v, gate=gate, **given), plain)
    uniform = reference.gate_uniform(q, k, v, **given)
    np.testing.assert_allclose(attention(q, k, v, gate="pv", **given), uniform, atol=3e-6)
    kept = mask(SHAPE, 0.3) / (90 * (1 - round(0.3 * UNIT) / UNIT))
    np.testing.assert_allclose(uniform, kept @ np.repeat(v, 2, axis=1), atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("rules", [{}, {"causal": True, "sink": random(4, seed=9)}])
def test_gradients(dtype: Any, rules: dict[str, Any]) -> None:
    q, k, v = problem(dtype)
    check_gradients(q, k, v, dlse=random(2, 4, 70, seed=6), dropout_p=0.3, rng=RNG, **rules)


def test_nothing_is_dropped_without() -> None:
    """The call, and the kernel that it would be built as, are those of a call without dropout."""
    q, k, v = problem()
    plain = attention(q, k, v)
    for p in (0, 0.0, 2.0**-20):
        np.testing.assert_array_equal(attention(q, k, v, dropout_p=p), plain)
        np.testing.assert_array_equal(attention(q, k, v, dropout_p=p, rng=RNG), plain)
    problem_ = contiguous_problem(1, 1, 64, 64)
    assert describe_rules(problem_.scores, "float16", dropout_p=0.0) == NO_RULES
    for kernel in ("mma_sm80", "wgmma_sm90", "cluster_sm90"):
        config = selector.select(problem_, "sm_90a", kernel=kernel).config
        assert config.defines()["FC_RULES"] == 0


def test_the_ladder_is_passed_over() -> None:
    q, k, v = problem(np.float16)
    with pytest.raises(ValueError, match="kernel 'scalar': has no dropout_p"):
        attention(q, k, v, dropout_p=0.1, rng=RNG, kernel="scalar")


# --- where the draw comes from --------------------------------------------------------------------


def draws() -> dict[str, Any]:
    seed, offset = RNG
    found = {
        "list": [seed, offset],
        "numpy's integers": (np.uint64(seed), np.int32(offset)),
        "uint64": np.array(RNG, np.uint64),
        "int64": np.array([seed - 2**64, offset]),
        "another byte order": np.array(RNG, ">u8"),
        "32 bits": np.array(RNG, "<u8").view("<u4"),
        "int32": np.array(RNG, "<u8").view("<i4"),
        "32 bits in another byte order": np.array(RNG, "<u8").view("<u4").astype(">u4"),
        "strided": np.array([seed, 0, offset, 0], np.uint64)[::2],
    }
    if importlib.util.find_spec("torch") is not None:
        import torch

        found["torch"] = torch.tensor([seed - 2**64, offset])
    return found


def test_every_form_of_rng() -> None:
    q, k, v = problem()
    expected = attention(q, k, v, dropout_p=0.3, rng=RNG)
    kept = dropout_mask((1, 1, 20, 20), 0.3, RNG)
    for name, rng in draws().items():
        got = attention(q, k, v, dropout_p=0.3, rng=rng)
        np.testing.assert_array_equal(got, expected, err_msg=name)
        found = dropout_mask((1, 1, 20, 20), 0.3, rng)
        np.testing.assert_array_equal(np.asarray(found), kept, err_msg=name)


WRONG: tuple[tuple[dict[str, Any], type[Exception], str], ...] = (
    ({"dropout_p": 0.1}, ValueError, r"rng: got none with dropout_p=0\.1.*; pass rng=\(seed, off"),
    ({"dropout_p": 1.0, "rng": RNG}, ValueError, "dropout_p: got 1.0; use a number from 0 up to"),
    ({"dropout_p": -0.1, "rng": RNG}, ValueError, "dropout_p: got -0.1; use"),
    ({"dropout_p": float("nan"), "rng": RNG}, ValueError, "dropout_p: got nan; use"),
    ({"dropout_p": "a", "rng": RNG}, TypeError, "dropout_p: got str; use a number, or 0 for none"),
    ({"dropout_p": True, "rng": RNG}, TypeError, "dropout_p: got bool"),
    ({"dropout_p": 0.1, "rng": 5}, TypeError, "rng: "),
    ({"dropout_p": 0.1, "rng": (5,)}, ValueError, r"rng: got \(5,\); pass rng=\(seed, offset\)"),
    ({"dropout_p": 0.1, "rng": (5, -1)}, ValueError, r"rng: got \(5, -1\); pass"),
    ({"dropout_p": 0.1, "rng": (2**64, 0)}, ValueError, "rng: got .*; pass"),
    ({"dropout_p": 0.1, "rng": (0.5, 1)}, TypeError, r"rng: got \(0.5, 1\); pass"),
    ({"rng": (0.5, 1)}, TypeError, r"rng: got \(0.5, 1\); pass"),
    ({"dropout_p": 0.1, "rng": np.zeros(2)}, TypeError, r"rng: got float64 of shape \(2,\); pass"),
    ({"dropout_p": 0.1, "rng": np.zeros(3, "u8")}, TypeError, r"rng: got uint64 of shape \(3,\)"),
    ({"dropout_p": 0.1, "rng": np.zeros(2, "u4")}, TypeError, r"rng: got uint32 of shape \(2,\)"),
)


@pytest.mark.parametrize(("given", "error", "message"), WRONG)
def test_what_is_refused(given: dict[str, Any], error: type[Exception], message: str) -> None:
    q, k, v = problem()
    with pytest.raises(error, match=message):
        attention(q, k, v, **given)
    o, lse = attention(q, k, v, return_lse=True)
    with pytest.raises(error, match=message):
        attention_backward(o, q, k, v, o, lse, **given)
    if "dropout_p" in given:
        with pytest.raises(error, match=message):
            dropout_mask((1, 1, 2, 2), given["dropout_p"], given.get("rng"))


@pytest.mark.parametrize("shape", [(1, 1, 2), 5, (1, 1, 2, -1), (1, 1, 2, 0.5), "abcd"])
def test_what_is_no_shape(shape: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="shape: got"):
        dropout_mask(shape, 0.1, RNG)


def test_an_empty_mask() -> None:
    assert flashcore_cupy.dropout_mask((2, 0, 3, 4), 0.1, RNG).shape == (2, 0, 3, 4)
