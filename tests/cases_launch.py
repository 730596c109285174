"""What problems give to a launch: parameters, and tensor maps of arrays at addresses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np

from flashcore_cupy.launch import tensor_map
from flashcore_cupy.launch.parameter_block import ParameterBlock
from flashcore_cupy.launch.plan import LoadedKernel, Place, _fixed_params
from flashcore_cupy.problem.attention_problem import (
    AttentionProblem,
    Operand,
    operand,
)
from flashcore_cupy.problem.rules import describe_rules
from flashcore_cupy.select import params, selector
from flashcore_cupy.select.config import KernelConfig
from flashcore_cupy.select.tensor_view import View

HERE = Place(device=0, arch="sm_90a", multiprocessors=132, sources=None)
KERNEL = "wgmma_sm90"
HOPPER = "sm_90a"


def fixed(problem: AttentionProblem, kernel: str = "mma_sm80", registers: int = 128) -> Any:
    """The parameters of a problem, without addresses."""
    chosen = selector.select(problem, HERE.arch, kernel=kernel).config
    out = np.empty(problem.output_shape, np.float16)
    o = operand("o", out, "packed" if problem.packed else problem.layout)
    built = SimpleNamespace(entries={"fwd": SimpleNamespace(registers=registers)})
    kernel = LoadedKernel(chosen, built, {})
    return _fixed_params(problem, kernel, o, HERE)


def config_of(problem: AttentionProblem, **overrides: int) -> KernelConfig:
    return selector.select(problem, HOPPER, kernel=KERNEL, overrides=overrides).config


def output_of(problem: AttentionProblem, x: Any = None) -> Operand:
    """The output as an operand: ``x``, or else a new array."""
    if x is None:
        x = np.empty(problem.output_shape, np.float16)
    return operand("o", x, "packed" if problem.packed else problem.layout)


def views(problem: AttentionProblem, **overrides: int) -> dict[str, View]:
    chosen = config_of(problem, **overrides)
    found = chosen.views(problem, output_of(problem))
    return {view.name: view for view in found}


def ruled(problem: AttentionProblem, **rules: Any) -> AttentionProblem:
    described = describe_rules(problem.scores, problem.dtype, packed=problem.packed, **rules)
    return replace(problem, rules=described)


def array_at(address: int, like: Any = None) -> Any:
    return SimpleNamespace(data=SimpleNamespace(ptr=address, device_id=0), **(like or {}))


def moved(
    problem: AttentionProblem, chosen: KernelConfig, *, movable: bool = True
) -> Iterator[tuple[np.ndarray[Any, Any], tuple[int, int, int, int]]]:
    """Words of the four maps in one block of parameters, moved from place to place."""
    views = chosen.views(problem, output_of(problem))
    addresses = {"q": 2**40, "k": 2**41, "v": 2**42, "o": 2**39}
    maps = tensor_map.Maps(views, addresses, chosen.params)
    assert maps.movable == movable
    arrays = {name: array_at(2**40) for name in "qkvo"}
    given = fixed(problem, KERNEL)
    for name, words in tensor_map.maps_of(views, arrays).items():
        given[f"{name}_map"] = words
    block = ParameterBlock(given)
    for place in (
        (2**40 + 16, 2**30, 2**35 + 4096, 2**44),
        (2**46 + 256, 2**43 - 16, 2**20, 2**12),
        (16, 0, 0, 32),
    ):
        maps.move(block, *place)
        q, k, v, o = place
        found = block.bytes.view(params.HOPPER_PARAMS)[0]
        yield np.concatenate([found[f"{name}_map"] for name in "qkvo"]), (q, k or q, v or q, o)
        assert found["seqlen_q"] == problem.seqlen_q
