"""Repeated calls for gradients: what they are known by, and what they hand to the driver."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from noted_launches import Array, Driver, install

import flashcore_cupy
from flashcore_cupy import backward
from flashcore_cupy.launch import backward_cache, launch_cache, tensor_map
from flashcore_cupy.launch.backward import GpuBackward
from flashcore_cupy.launch.parameter_block import ParameterBlock
from flashcore_cupy.launch.plan import Step
from flashcore_cupy.problem.attention_problem import contiguous_problem
from flashcore_cupy.problem.gradients import BACKWARD_ARGUMENTS, Gradients, contiguous_gradients
from flashcore_cupy.select.backward import (
    backward_params,
    pointer_of,
    select_backward,
)

SHAPE = (1, 2, 100, 64)
CHOICES = (
    *(("q", "k", "v"), (-1, -1), "bhsd", "auto", True, bool, 0.0, float),
    *(None, type(None), 0.0, float, False, bool, True, bool),
)


@pytest.fixture(params=[True, False], ids=["maps move", "maps are encoded"])
def driver(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Driver:
    monkeypatch.setattr(backward_cache, "_known", {})
    return install(monkeypatch, movable=request.param)


def operands(first: int = 2**30, **changes: Array) -> dict[str, Any]:
    made: dict[str, Any] = {
        name: Array(SHAPE, ptr=first + 2**20 * n) for n, name in enumerate(["do", *"qkvo"])
    }
    made["lse"] = Array(SHAPE[:3], "float32", first + 2**28)
    return made | {"dlse": None} | changes


def bound_to(given: dict[str, Any], driver: Driver, arch: str = "sm_90a") -> GpuBackward:
    """What the long way makes of a call."""
    attention = contiguous_problem(*SHAPE[:2], SHAPE[2], SHAPE[3], causal=True)
    problem = contiguous_gradients(attention)
    selection = select_backward(problem, arch)
    arrays = {pointer_of(name): x for name, x in given.items() if x is not None}
    arrays |= {result.name: driver.empty(result.shape, result.dtype) for result in problem.results}
    shapes = selection.scratch(attention)
    arrays |= {name: driver.empty(shape, "float32") for name, shape in shapes.items()}
    bound = GpuBackward(problem, selection, arrays, params=backward_params(problem, selection))
    bound.launches = tuple(launches_of(bound, arrays))
    bound.steps = tuple(
        Step(
            100 + x.number, x.grid, x.config.threads, x.config.smem_bytes, ParameterBlock(x.params)
        )
        for x in bound.launches
    )
    return bound


def launches_of(bound: GpuBackward, arrays: dict[str, Any]) -> Any:
    addresses = {name: x.data.ptr for name, x in arrays.items()}
    return bound.launches_at(addresses, tensor_map.encode)


def parts_of(memory: Array, shapes: dict[str, tuple[int, ...]]) -> dict[str, Array]:
    """Arrays of float32 one behind the other, each where the widest load may begin."""
    first, found = memory.data.ptr, {}
    for name, shape in shapes.items():
        found[name] = Array(shape, "float32", first)
        first += -(-4 * int(np.prod(shape)) // 64) * 64
    assert memory.dtype == np.float32
    assert first == memory.data.ptr + 4 * int(np.prod(memory.shape))
    return found


@pytest.mark.parametrize("arch", ["sm_90a", "sm_80"])
def test_a_repeated_call_launches_what_the_long_way_would(driver: Driver, arch: str) -> None:
    given = operands()
    assert backward_cache.launch_again(given, CHOICES) is None
    bound = bound_to(given, driver, arch)
    backward_cache.remember(bound, given, CHOICES)
    for other in (given, operands(2**33), operands(2**35 + 4096), given):
        driver.launches.clear()
        driver.made.clear()
        found = backward_cache.launch_again(other, CHOICES)
        assert isinstance(found, Gradients)
        assert [x.shape for x in found[:3]] == [SHAPE] * 3 and found.dbias is None
        new = dict(zip([*bound.gradients._fields[:3]], found[:3], strict=True))
        (memory,) = driver.made[3:]
        new |= parts_of(memory, bound.selection.scratch(bound.problem.attention))
        new |= {pointer_of(name): x for name, x in other.items() if x is not None}
        want = launches_of(bound, new)
        assert len(driver.launches) == len(want) >= 3
        for n, launch in enumerate(want):
            geometry, stream, contents = driver.launches[n]
            assert geometry[:2] == (100 + n, launch.grid) and stream == 7
            own = ParameterBlock(launch.params).words.tobytes()
            assert contents[: len(own)] == own, "what comes behind is another launch's"
    assert set(driver.devices_set) == {0}, "a new thread has no context"


def test_what_a_call_is_known_by(driver: Driver) -> None:
    given = operands()
    backward_cache.remember(bound_to(given, driver), given, CHOICES)

    def again(changed: dict[str, Any] | None = None, **choices: Any) -> Any:
        at = {"wrt": 0, "window": 1, "causal": 4, "kind": 5, "dropout_p": 10, "deterministic": 14}
        chosen = list(CHOICES)
        for name, x in choices.items():
            chosen[at[name]] = x
        return backward_cache.launch_again(operands(**(changed or {})), tuple(chosen))

    assert again() is not None
    for name in given.keys() - {"dlse"}:
        x = given[name]
        last = (*x.shape[:-1], x.shape[-1] + 1)
        for other in (
            Array(last, x.dtype, x.data.ptr),
            Array(x.shape, "int16", x.data.ptr),
            Array(x.shape, x.dtype, x.data.ptr + 4),
            Array(x.shape, x.dtype, x.data.ptr, device=1),
            Array(x.shape, x.dtype, x.data.ptr, strides=(2**20, *x.strides[1:])),
            np.zeros(x.shape, x.dtype),
            None,
        ):
            assert again({name: other}) is None, (name, other)
    assert again({"dlse": Array(SHAPE[:3], "float32", 512)}) is None
    for choices in (
        {"wrt": ("q", "k")},
        {"wrt": ["q", "k", "v"]},
        {"window": (5, -1)},
        {"window": (-1.0, -1)},
        {"window": 5},
        {"causal": False},
        {"causal": 1, "kind": int},
        {"dropout_p": 0.1},
        {"deterministic": False},
    ):
        assert again(**choices) is None, choices
    driver.device = 1
    assert again() is None
    driver.device, driver.captured = 0, True
    assert again() is None, "what it allocates is the graph's"
    driver.captured = False
    assert again() is not None


def test_other_kernels_of_the_environment_are_not_missed(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = operands()
    bound = bound_to(given, driver)
    monkeypatch.setenv("FLASHCORE_ARCH", "sm_80")
    backward_cache.remember(bound, given, CHOICES)
    assert not backward_cache._known
    monkeypatch.delenv("FLASHCORE_ARCH")
    backward_cache.remember(bound, given, CHOICES)
    assert backward_cache.launch_again(given, CHOICES) is not None
    monkeypatch.setenv("FLASHCORE_ARCH", "sm_80")
    assert backward_cache.launch_again(given, CHOICES) is None
    monkeypatch.delenv("FLASHCORE_ARCH")
    assert backward_cache.launch_again(given, CHOICES) is not None
    assert launch_cache._variable_count > 0


def test_what_is_not_remembered(driver: Driver) -> None:
    given = operands()
    bound = bound_to(given, driver)
    for changed, choices in (
        (given | {"q": np.zeros(SHAPE, np.float16)}, CHOICES),
        (given | {"o": Array(SHAPE, ptr=12345 * 16)}, CHOICES),  # it was copied
        (given, (["q", "k", "v"], *CHOICES[1:])),
        (given, (*CHOICES[:8], SimpleNamespace(), *CHOICES[9:])),
    ):
        backward_cache.remember(bound, changed, choices)
        assert not backward_cache._known
    driver.next += 8  # an allocator of the caller's
    backward_cache.remember(bound_to(given, driver), given, CHOICES)
    assert not backward_cache._known


def test_an_allocator_may_give_less_aligned_memory_later(driver: Driver) -> None:
    given = operands()
    backward_cache.remember(bound_to(given, driver), given, CHOICES)
    driver.next += 4
    assert backward_cache.launch_again(given, CHOICES) is None and not driver.launches


def test_calls_at_the_same_time_have_blocks_of_their_own(driver: Driver) -> None:
    given = operands()
    backward_cache.remember(bound_to(given, driver), given, CHOICES)
    launch, inner = driver.launch, []

    def interrupted(*arguments: Any) -> None:
        if not inner:
            inner.append(True)
            sys.modules["cupy"].cuda.driver.launchKernel = launch
            assert backward_cache.launch_again(operands(2**34), CHOICES) is not None
        launch(*arguments)

    sys.modules["cupy"].cuda.driver.launchKernel = interrupted
    assert backward_cache.launch_again(given, CHOICES) is not None
    (known,) = backward_cache._known.values()
    assert len(known.blocks) == 2
    q = [np.frombuffer(contents, np.uint64)[0] for *_, contents in driver.launches]
    assert len(q) == 2 * len(known.launches)
    assert set(q[: len(known.launches)]) == {2**34 + 2**20}
    assert set(q[len(known.launches) :]) == {2**30 + 2**20}


def test_not_all_are_kept_for_good(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backward_cache, "_LIMIT", 2)
    given = operands()
    bound = bound_to(given, driver)
    for scale in (0.5, 0.25, 0.125):
        chosen = (*CHOICES[:8], scale, float, *CHOICES[10:])
        backward_cache.remember(bound, given, chosen)
    assert len(backward_cache._known) == 1


@pytest.mark.parametrize(
    ("arguments", "looks"),
    [
        ({}, True),
        ({"causal": True, "window": (5, -1), "softcap": 2.0, "layout": "bshd"}, True),
        ({"wrt": ("q",), "deterministic": False, "batch_invariant": True}, True),
        ({"dropout_p": 0.1}, True),
        ({"dropout_p": 0.1, "rng": (1, 2)}, True),
        ({"out": {"dq": 1}}, False),
        ({"accumulate": True}, False),
        ({"accumulate": 0}, False),
        ({"gate": "dp"}, False),
        ({"config": {}}, False),
        ({"stream": 7}, False),
        ({"mystery": 7}, False),
        *(({name: 1}, True) for name in backward._KNOWN_RULES),
    ],
)
def test_which_calls_are_looked_for(
    monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], looks: bool
) -> None:
    """All arguments key a call, or keep it from being looked for."""
    found = Gradients(dq=1)
    keys: list[Any] = []

    def launch_again(operands: Any, choices: tuple[Any, ...], rules: Any) -> Gradients:
        assert list(operands) == ["do", "q", "k", "v", "o", "lse", "dlse"]
        keys.append((choices, rules))
        return found

    monkeypatch.setattr(backward_cache, "launch_again", launch_again)
    given = dict.fromkeys(["do", "q", "k", "v", "o", "lse"], object())
    try:
        got = flashcore_cupy.attention_backward(**given, **arguments)
    except (TypeError, ValueError):
        got = None
    assert (got is found) == looks == bool(keys)
    if looks and arguments:
        flashcore_cupy.attention_backward(**given)
        assert keys[0] != keys[1]


def test_an_argument_that_is_new_has_to_be_thought_of() -> None:
    known = {*backward._KNOWN_BY, *backward._KNOWN_RULES, *backward._NOT_KNOWN}
    known |= {"wrt", "window", "accumulate"}
    beside = {"stream", "do", "o", "lse", "dlse", "q", "k", "v"}
    assert known == set(BACKWARD_ARGUMENTS) - beside
