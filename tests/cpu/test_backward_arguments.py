"""attention_backward's arguments: what is refused and how, what a call is described as."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from cases_arguments import DV, HKV, HQ, SKV, SQ, B, D, ones, operands, random, refusal
from cases_gradients import bent, run

import flashcore_cupy
from flashcore_cupy import attention
from flashcore_cupy.backward import attention_backward
from flashcore_cupy.problem.gradients import BACKWARD_ARGUMENTS, BackwardRequest, Gradients
from flashcore_cupy.problem.request import ARGUMENTS, Request

OUT, LSE = (B, HQ, SQ, DV), (B, HQ, SQ)
SLOPES = np.array([0.5, 0.25, 2.0, 1.0], np.float32)


def arrays(dtype: Any = np.float16) -> dict[str, Any]:
    """All that a call needs, consistent with each other."""
    q, k, v = operands(dtype)
    o, lse = attention(q, k, v, return_lse=True)
    return {"do": random(*OUT, dtype=dtype, seed=5), "q": q, "k": k, "v": v, "o": o, "lse": lse}


def test_it_takes_what_attention_takes() -> None:
    taken = set(inspect.signature(attention_backward).parameters) - {"unknown"}
    forward = set(inspect.signature(attention).parameters) - {"unknown"}
    assert taken == set(BACKWARD_ARGUMENTS) and forward == set(ARGUMENTS)
    own = {"do", "o", "lse", "dlse", "wrt", "deterministic", "accumulate", "score_mod_grad"}
    assert taken - forward == own and forward - taken == {"return_lse"}
    for name in taken & forward - {"kernel"}:
        defaults = [
            inspect.signature(f).parameters[name].default for f in (attention, attention_backward)
        ]
        assert defaults[0] == defaults[1], name
    assert flashcore_cupy.attention_backward is attention_backward


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no do": ({"do": None}, TypeError, "do: got NoneType; use a CuPy array"),
    "no o": ({"o": None}, TypeError, "o: got NoneType"),
    "no lse": ({"lse": None}, TypeError, "lse: got NoneType"),
    "a list": ({"lse": [1.0]}, TypeError, "lse: got list; use a CuPy array"),
    "q of another dtype": ({"q": ones(B, HQ, SQ, D)}, TypeError, "k: got dtype float16, but q is"),
    "do of another shape": (
        {"do": ones(B, HQ, SQ, D, dtype=np.float16)},
        ValueError,
        "do: got shape (2, 4, 9, 16); this problem's output's is (2, 4, 9, 8)",
    ),
    "do of another dtype": ({"do": ones(*OUT)}, TypeError, "do: got dtype float32; q's is float16"),
    "o of another dtype": ({"o": ones(*OUT)}, TypeError, "o: got dtype float32; q's is float16"),
    "o in the other layout": (
        {"o": ones(B, SQ, HQ, DV, dtype=np.float16)},
        ValueError,
        "o: got shape (2, 9, 4, 8)",
    ),
    "lse of another shape": (
        {"lse": ones(B, SQ, HQ)},
        ValueError,
        "lse: got shape (2, 9, 4); this problem's log-sum-exp's is (2, 4, 9)",
    ),
    "lse in float64": (
        {"lse": ones(*LSE, dtype=np.float64)},
        TypeError,
        "lse: got dtype float64; use float32",
    ),
    "lse in another byte order": (
        {"lse": ones(*LSE, dtype=">f4")},
        TypeError,
        "lse: got dtype >f4; use float32",
    ),
    "dlse of another shape": ({"dlse": ones(HQ, SQ)}, ValueError, "dlse: got shape (4, 9)"),
    "dlse in float16": (
        {"dlse": ones(*LSE, dtype=np.float16)},
        TypeError,
        "dlse: got dtype float16; use float32",
    ),
    "wrt as text": ({"wrt": "q"}, TypeError, "wrt: got 'q'; use a tuple of some of 'q', 'k', 'v'"),
    "wrt of nothing": ({"wrt": ()}, TypeError, "wrt: got (); use a tuple"),
    "wrt of a mask": ({"wrt": ("mask",)}, ValueError, "wrt: got 'mask'; choose some of 'q', 'k'"),
    "wrt of a number": ({"wrt": (1,)}, ValueError, "wrt: got 1; choose"),
    "wrt of what is not there": (
        {"wrt": ("q", "bias")},
        ValueError,
        "wrt: asks for the gradient of bias, which is not given",
    ),
    "wrt twice": ({"wrt": ("q", "q")}, ValueError, "wrt: got ('q', 'q'); name each input once"),
    "deterministic": ({"deterministic": 1}, TypeError, "deterministic: got 1; use True or False"),
    "accumulate": ({"accumulate": "yes"}, TypeError, "accumulate: got 'yes'; use True or False"),
    "accumulate without out": (
        {"accumulate": True},
        ValueError,
        "out: got no dq; accumulate=True adds to arrays that are given, one for each of wrt",
    ),
    "accumulate without dv": (
        {"accumulate": True, "out": {"dq": ones(1), "dk": ones(1)}},
        ValueError,
        "out: got no dv; accumulate=True",
    ),
    "accumulate in float16": (
        {"accumulate": True, "wrt": ("q",), "out": (ones(B, HQ, SQ, D, dtype=np.float16),)},
        TypeError,
        "out.dq: got dtype float16; use float32, which accumulate=True adds in",
    ),
    "out as an array": (
        {"out": ones(B, HQ, SQ, D), "wrt": ("q",)},
        TypeError,
        "out: got ndarray of shape (2, 4, 9, 16); use a mapping such as {'dq': ...}, the Gradients",
    ),
    "out of too few": (
        {"out": (None,)},
        ValueError,
        "out: got 1 arrays; use one for each of wrt, 3",
    ),
    "out of what is not asked for": (
        {"out": {"dsink": ones(HQ)}},
        ValueError,
        "out: has 'dsink'; wrt asks for dq, dk, dv",
    ),
    "out by inputs' names": ({"out": {"q": ones(1)}}, ValueError, "out: has 'q'; wrt asks for dq"),
    "out of another shape": (
        {"out": {"dk": ones(B, HQ, SKV, D)}},
        ValueError,
        "out.dk: got shape (2, 4, 14, 16); this problem's is (2, 2, 14, 16)",
    ),
    "out of another dtype": (
        {"out": {"dq": ones(B, HQ, SQ, D, dtype=np.float64)}},
        TypeError,
        "out.dq: got dtype float64; use float32, or q's, float16",
    ),
    "out of no array": ({"out": {"dq": [1.0]}}, TypeError, "out.dq: got list; use a CuPy array"),
    "out with a stride": (
        {"out": {"dq": ones(B, HQ, SQ, 2 * D)[..., ::2]}},
        ValueError,
        "out.dq: its last axis is not contiguous",
    ),
    "out as a broadcast view": (
        {"out": {"dv": np.lib.stride_tricks.as_strided(ones(9), (B, HKV, SKV, DV), (0, 0, 0, 4))}},
        ValueError,
        "out.dv: its elements share memory",
    ),
    "a derivative of nothing": (
        {"score_mod_grad": lambda s, b, h, i, j: s},
        ValueError,
        "score_mod_grad: given without a score_mod",
    ),
    "a derivative as text": (
        {"score_mod": bent, "score_mod_grad": "1.0f"},
        TypeError,
        "score_mod_grad: got str; on NumPy arrays pass a callable",
    ),
    "a derivative of other arguments": (
        {"score_mod": bent, "score_mod_grad": lambda s: s},
        TypeError,
        "score_mod_grad: cannot be called as score_mod_grad(score, b, h, q_idx, kv_idx",
    ),
    "a derivative of another shape": (
        {"score_mod": bent, "score_mod_grad": lambda s, *at: ones(3)},
        ValueError,
        "score_mod_grad: returned shape (3,); return the block's",
    ),
    "a derivative that is none": (
        {"score_mod": bent, "score_mod_grad": lambda s, *at: s > 0},
        TypeError,
        "score_mod_grad: returned ndarray of shape (9, 14), dtype bool; return the derivatives",
    ),
    "a formula without a derivative": (
        {"score_mod": lambda s, *at: s - s.max()},
        TypeError,
        "score_mod: its derivative is not known, because of the method 'max'; pass it",
    ),
    "a gate": ({"gate": "qk"}, ValueError, "gate: got 'qk'; choose one of None, 'dp', 'ds'"),
    "a gate and its own array": (
        {"gate": "dp", "out": {"dq": ones(B, HQ, SQ, D)}},
        ValueError,
        "out: gate 'dp' stops before the gradients; leave one of them out",
    ),
    "a gate of a packed batch": (
        {"gate": "ds", "cu_seqlens_q": [0, 9], "cu_seqlens_k": [0, 14]},
        ValueError,
        "gate: got 'ds' with cu_seqlens; stop at a stage without packing",
    ),
    "a gate of a sink": (
        {"gate": "ds", "sink": ones(HQ), "wrt": ("sink", "q")},
        ValueError,
        "gate: the gradient of sink has no stage 'ds'; begin wrt with 'q'",
    ),
    "a name of torch": (
        {"is_causal": True},
        TypeError,
        "attention_backward() has no argument 'is_causal': use causal",
    ),
    "a kernel of no name": ({"kernel": "best"}, ValueError, "kernel: got 'best'"),
    "a stream": ({"stream": 3}, ValueError, "stream: is of a GPU, but q, k, v are NumPy"),
    "a tile for NumPy": (
        {"config": {"block_n": 32}},
        ValueError,
        "config: changes a kernel's tile",
    ),
    "what attention refuses": ({"causal": "bottom"}, ValueError, "causal: got 'bottom'"),
    "a bias of another length": ({"bias": ones(SKV - 1)}, ValueError, "bias: got shape (13,)"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused(name: str) -> None:
    arguments, error, message = BAD[name]
    given = arrays() | arguments
    assert refusal(error, lambda: attention_backward(**given)).startswith(message)


def test_out_shares_memory_with_nothing() -> None:
    given = arrays(np.float32)
    table = random(B, HQ, SQ, D, seed=9)
    given |= {"dlse": ones(*LSE), "bias": ones(B, HQ, SQ, SKV), "score_mod": looked_up}
    given["mod_args"] = {"table": table}
    room = ones(B, HQ, SQ, D + SKV + DV)
    sharing: dict[str, tuple[np.ndarray, np.ndarray]] = {
        "q": (given["q"], given["q"]),
        "mod_args['table']": (table, table),
        "bias": (room[..., :SKV], room[..., :D]),
        "do": (room[..., -DV:], room[..., -D:]),
    }
    for name, (x, out) in sharing.items():
        some = given if "[" in name else given | {name: x}
        message = refusal(
            ValueError, lambda out=out, some=some: attention_backward(**some, out={"dq": out})
        )
        assert message == f"out.dq: overlaps {name} in memory; use another array"
    both = ones(B, HKV, SKV, D + DV - 1)
    out = {"dk": both[..., :D], "dv": both[..., -DV:]}
    message = refusal(ValueError, lambda: attention_backward(**given, out=out))
    assert message == "out.dk: overlaps out.dv in memory; use another array"


def looked_up(score: Any, b: Any, h: Any, i: Any, j: Any, table: Any) -> Any:
    return score + table[b, h, 0, 0]


def test_read_only_results_are_refused() -> None:
    dq = ones(B, HQ, SQ, D)
    dq.flags.writeable = False
    message = refusal(ValueError, lambda: attention_backward(**arrays(), out={"dq": dq}))
    assert message == "out.dq: is read-only; use an array of your own"


OUTS: dict[str, Callable[[dict[str, np.ndarray]], Any]] = {
    "a mapping": lambda given: given,
    "a part": lambda given: {"dk": given["dk"]},
    "gradients": lambda given: Gradients(**given),
    "a tuple": lambda given: tuple(given.values()),
    "a list with a gap": lambda given: [given["dq"], None, given["dv"]],
}


@pytest.mark.parametrize("name", OUTS)
def test_results_that_are_given(name: str) -> None:
    given = arrays()
    plain = attention_backward(**given)
    room = {f"d{n}": np.full_like(given[n], np.nan) for n in "qkv"}
    out = OUTS[name](room)
    got = attention_backward(**given, out=out)
    wanted = out._asdict() if isinstance(out, Gradients) else out
    if not isinstance(wanted, dict):
        wanted = dict(zip(("dq", "dk", "dv"), wanted, strict=True))
    for field, x in got._asdict().items():
        if wanted.get(field) is not None:
            assert x is room[field]
        if field in room:
            np.testing.assert_array_equal(x, getattr(plain, field))


def test_slopes_and_sinks_in_lists_have_gradients_in_float32() -> None:
    rules = {"alibi_slopes": SLOPES.tolist(), "sink": SLOPES.astype(np.float64)}
    got = run(*operands(), **rules)
    for x in (got.dalibi_slopes, got.dsink):
        assert x.shape == (HQ,) and x.dtype == np.float32 and x.any()


def test_a_derivative_that_is_given_is_taken() -> None:
    def grad(score: Any, *at: Any) -> Any:
        slope = 1 - np.tanh(score) ** 2
        score[...] = 0  # a block of its own
        return slope

    got = run(*operands(), score_mod=lambda s, *at: np.tanh(s))
    o, lse = attention(*operands(), score_mod=lambda s, *at: np.tanh(s), return_lse=True)
    q, k, v = operands()
    do = random(*OUT, dtype=np.float16, seed=5)
    for mod in (lambda s, *at: np.tanh(s), lambda s, *at: np.tanh(np.asarray(s))):
        given = attention_backward(do, q, k, v, o, lse, score_mod=mod, score_mod_grad=grad)
        for x, y in zip(got[:3], given[:3], strict=True):
            np.testing.assert_allclose(x, y, rtol=2e-3, atol=1e-4)
    twice = attention_backward(
        do, q, k, v, o, lse, score_mod=mod, score_mod_grad=lambda s, *at: 2 * grad(s)
    )
    np.testing.assert_allclose(twice.dq, 2 * got.dq, rtol=4e-3, atol=1e-4)


def test_a_kernel_of_the_forward_pass_has_no_gradients() -> None:
    with pytest.raises(ValueError, match="kernel: got 'mma_sm80'; choose one of 'auto', 'bwd_"):
        attention_backward(**arrays(), kernel="mma_sm80")


# --- what a call is described as ------------------------------------------------------------------


def described(out: Any = None, **arguments: Any) -> Any:
    given = {"wrt": ("q", "k", "v"), "deterministic": True, "accumulate": False}
    given |= {"score_mod_grad": None}
    own = {name: arguments.pop(name) for name in list(arguments) if name in given}
    request = BackwardRequest.of(Request.of(arguments), **(given | own), out=out)
    operands_ = {"dlse": None, **arrays()}
    return request.call(operands_, request.out, on_gpu=False, empty=np.empty)


def test_a_call_is_described_once() -> None:
    """Equal for equal arrays elsewhere, hashable, and of everything that a kernel is built for."""
    plain = described()
    assert plain.problem == described().problem and hash(plain.problem) == hash(described().problem)
    assert [result.name for result in plain.problem.results] == ["dq", "dk", "dv"]
    assert [result.operand.shape for result in plain.problem.results] == [
        *((B, HQ, SQ, D), (B, HKV, SKV, D), (B, HKV, SKV, DV))
    ]
    assert {*plain.arrays} == {"do", "q", "k", "v", "o", "lse", "dq", "dk", "dv"}
    others = [
        described(wrt=("q",)),
        described(wrt=("k", "q", "v")),
        described(deterministic=False),
        described(causal=True),
        described(out={"dq": np.empty((B, HQ, SQ, D), np.float32)}),
        described(out={"dq": np.empty((B, SQ, HQ, D), np.float16).swapaxes(1, 2)}),
        described(bias=ones(SKV), wrt=("q", "k", "v", "bias")),
        described(accumulate=True, wrt=("q",), out={"dq": np.empty((B, HQ, SQ, D), np.float32)}),
        described(score_mod="tanhf(score)", score_mod_grad="1 - score * score", kernel="mma_sm80"),
        described(score_mod="tanhf(score)", kernel="mma_sm80"),
    ]
    problems = [call.problem for call in (plain, *others)]
    assert len(set(problems)) == len(problems)
    assert others[6].arrays["dbias"].shape == (SKV,)
    assert others[6].problem.results[3].operand is None


def test_what_is_copied_is_told() -> None:
    request = BackwardRequest.of(
        Request.of({}),
        wrt=("q",),
        deterministic=True,
        accumulate=False,
        score_mod_grad=None,
        out=None,
    )
    given = arrays() | {"dlse": np.broadcast_to(np.float32(1), LSE)}
    given["do"] = np.broadcast_to(np.float16(1), OUT)
    given["lse"] = given["lse"].transpose(2, 1, 0).copy().transpose(2, 1, 0)
    call = request.call(given, {}, on_gpu=False, empty=np.empty)
    assert set(call.copied) == {"do", "lse", "dlse"}
    assert call.copied["lse"] == "it is not C-contiguous" and call.problem.has_dlse
    assert call.problem.do.strides == (HQ * SQ * DV, SQ * DV, DV)


# --- other libraries' arrays ----------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
def test_torch_tensors_give_torch_tensors() -> None:
    import torch

    given = arrays(np.float32)
    plain = attention_backward(**given)
    tensors = {name: torch.from_numpy(x) for name, x in given.items()}
    out = {"dk": torch.empty(B, HKV, SKV, D)}
    got = attention_backward(**tensors, out=out)
    assert got.dk is out["dk"]
    for x, y in zip(got[:3], plain[:3], strict=True):
        np.testing.assert_array_equal(x.numpy(), y)
    loss = torch.ones(()).expand(*OUT)  # as the gradient of a sum is
    summed = attention_backward(**(tensors | {"do": loss}))
    again = attention_backward(**(given | {"do": ones(*OUT)}))
    np.testing.assert_array_equal(summed.dq.numpy(), again.dq)
    message = refusal(
        TypeError,
        lambda: attention_backward(**(tensors | {"do": torch.ones(*OUT, requires_grad=True)})),
    )
    assert message.startswith("do: requires a gradient")
