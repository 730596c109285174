"""What tests of the kernels of gradients share: a call on a GPU or emulated, and its judgement."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
from cases_gradients import Rules, asked, operands, random
from helpers import one_at_a_time
from places import Place

from flashcore_cupy import attention
from flashcore_cupy.backward import attention_backward
from flashcore_cupy.check import verify_gradients
from flashcore_cupy.check.selftest.case import Mod
from flashcore_cupy.cpu.emulator import backward as emulated
from flashcore_cupy.cpu.emulator.plan import poisoned
from flashcore_cupy.cuda.targets import HOPPER
from flashcore_cupy.problem.gradients import BackwardRequest, Gradients, by_result, gathered
from flashcore_cupy.problem.request import Request

HALF, SINGLE, BRAIN = "float16", "float32", "bfloat16"
HEADS = 4
DROP: Rules = {"dropout_p": 0.3, "rng": (2**63 + 5, 9)}


def dtype_of(name: str) -> Any:
    import ml_dtypes

    return ml_dtypes.bfloat16 if name == BRAIN else np.dtype(name)


def runs(on: Place, kernel: str) -> None:
    if on.kind == "gpu":
        from flashcore_cupy.jit import compiler

        if kernel.startswith("bwd_sm90") and compiler.device_arch() != HOPPER:
            pytest.skip(f"{kernel} is for another GPU")


def by_kernel(rules: Rules, *, on_kernel: bool) -> Rules:
    """Mods as expressions, or as functions."""
    return {
        name: (x.cuda if on_kernel else x.python) if isinstance(x, Mod) else x
        for name, x in rules.items()
    }


def gradients(
    on: Place, kernel: str, given: dict[str, Any], wrt: Any, rules: Rules, **more: Any
) -> Gradients:
    """``attention_backward`` by a kernel; emulated, each call has another schedule."""
    rules = by_kernel(rules, on_kernel=True)
    if on.kind == "gpu":
        placed = {n: None if x is None else on.xp.asarray(x) for n, x in given.items()}
        on_gpu = {
            n: on.xp.asarray(x) if isinstance(x, np.ndarray) and "cu_seq" not in n else x
            for n, x in rules.items()
        }
        if "mod_args" in rules:
            on_gpu["mod_args"] = {n: on.xp.asarray(x) for n, x in rules["mod_args"].items()}
        got = attention_backward(**placed, wrt=wrt, kernel=kernel, **on_gpu, **more)
        return gathered({name: x.get() for name, x in by_result(got).items()})
    request = BackwardRequest.of(
        Request.of({"kernel": kernel, **rules}), wrt=wrt,
        deterministic=more.get("deterministic", True),
        accumulate=more.get("accumulate", False), score_mod_grad=more.get("score_mod_grad"),
        out=more.get("out"),
    )  # fmt: skip
    call = request.call(
        given, more.get("out") or {}, on_gpu=False, empty=lambda s, d: poisoned(s, np.dtype(d))
    )
    bound = emulated.bind(call, HOPPER)
    configs = repr([step.config for step in bound.steps])
    with one_at_a_time(hashlib.sha256(configs.encode()).hexdigest()[:16]):
        bound.build()
    bound.launch(next(on.schedules))
    return gathered({result.name: bound.arrays[result.name] for result in bound.problem.results})


def check(
    on: Place,
    kernel: str,
    sizes: dict[str, Any],
    rules: Rules,
    *,
    dlse: bool = False,
    wrt: Any = None,
) -> None:
    runs(on, kernel)
    q, k, v = operands(**{"heads": HEADS, "heads_kv": 2, "head_dim": 64, "head_dim_v": 64, **sizes})
    plain = by_kernel(rules, on_kernel=False)
    o, lse = attention(q, k, v, return_lse=True, **plain)
    do = random(*o.shape, dtype=q.dtype, seed=5)
    given: dict[str, Any] = {"do": do, "q": q, "k": k, "v": v, "o": o, "lse": lse, "dlse": None}
    if dlse:
        given["dlse"] = random(*lse.shape, seed=6)
    wrt = asked(rules) if wrt is None else wrt
    expected = verify_gradients.expect(do, q, k, v, dlse=given["dlse"], wrt=wrt, **plain)
    got = gradients(on, kernel, given, wrt, rules)
    again = gradients(on, kernel, given, wrt, rules)
    faults = expected.faults(got)
    assert not faults, faults
    more = by_result(again)
    for name, x in by_result(got).items():
        assert x.tobytes() == more[name].tobytes(), f"{name}: another run gives other bits"
