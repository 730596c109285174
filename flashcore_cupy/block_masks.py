"""``block_mask``: a block mask from a rule, by a kernel, or on NumPy arrays by NumPy."""

# No `from __future__ import annotations`: help() shows the types.
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from flashcore_cupy.cuda import captures
from flashcore_cupy.launch.bind import place_of
from flashcore_cupy.launch.plan import launch_steps, load_kernel, step_of
from flashcore_cupy.problem import block_lists, interop
from flashcore_cupy.problem.array_spec import spec_of
from flashcore_cupy.problem.block_mask import BlockMask, checked_block, checked_length
from flashcore_cupy.problem.blocks import Block, ScoreShape
from flashcore_cupy.problem.listed_blocks import LISTS
from flashcore_cupy.problem.mods import check_mod_args, check_mods, describe_mods
from flashcore_cupy.problem.rule_arrays import rule_array
from flashcore_cupy.problem.rules import RULES
from flashcore_cupy.problem.stream import entered
from flashcore_cupy.problem.tracing import untraced
from flashcore_cupy.select.block_launch import empty_lists, launch_of
from flashcore_cupy.select.block_lister import Asked

__all__ = ["block_mask"]

Mod = str | Callable[..., Any]
_MASK = next(rule for rule in RULES if rule.name == "mask")


@untraced
def block_mask(
    mask_mod: Mod | None = None,
    mask: Any = None,
    *,
    seqlen_q: int,
    seqlen_kv: int,
    batch: int = 1,
    heads: int = 1,
    mod_args: Mapping[str, Any] | None = None,
    block: tuple[int, int] = (128, 128),
    stream: Any = None,
) -> BlockMask:
    """Find out which blocks of scores a rule leaves empty, mixed or full.

    One kernel asks the rule for every score; the host does not wait, and a captured graph asks
    again in each replay. With a Python function, or a NumPy array as the mask, NumPy does it.

    Parameters
    ----------
    mask_mod : str, or for NumPy a callable
        As ``attention`` takes it. The mask keeps it, as the rule of its mixed blocks.
    mask : array of bool, broadcastable to (batch, heads, Sq, Skv), optional
        The same as an array.
    seqlen_q, seqlen_kv : int
        Sq and Skv.
    batch, heads : int
        1 where the rule is the same for all of them: then they share lists.
    mod_args : mapping of names to arrays
        What mask_mod uses besides.
    block : (queries, keys)
        Of a block: 64 or 128 each.
    stream : optional
        As for ``attention``.

    Returns
    -------
    BlockMask
        To be passed to ``attention(..., block_mask=...)``. Its lists are CuPy arrays, or NumPy's.

    Raises
    ------
    TypeError, ValueError
        Before anything is launched; names the argument, what it got and what works.
    """
    block = checked_block(block)
    sizes = {"batch": batch, "heads": heads, "seqlen_q": seqlen_q, "seqlen_kv": seqlen_kv}
    scores = ScoreShape(*(checked_length(name, n) for name, n in sizes.items()))
    if mask_mod is None and mask is None:
        raise ValueError("mask_mod: got no rule; pass mask_mod or mask")
    given = {} if mod_args is None else mod_args
    check_mod_args(given, None, mask_mod)
    found = {"mask": mask} | {f"mod_args[{name!r}]": x for name, x in given.items()}
    where = (interop.gpu_of(name, x) for name, x in found.items() if x is not None)
    gpus = [gpu for gpu in where if gpu is not None]
    on_gpu = bool(gpus) or isinstance(mask_mod, str)
    if not on_gpu and stream is not None:
        raise ValueError("stream: is of a GPU, but NumPy asks this rule; leave it out")
    rule = {"mask_mod": mask_mod, "mask": mask, "mod_args": mod_args}
    if on_gpu:
        lists = _on_gpu(gpus, scores, block, rule, given, stream)
    else:
        lists = _on_host(scores, block, mask_mod, mask, given)
    arrays = dict(zip(LISTS, lists, strict=True))
    return BlockMask(arrays, (scores.seqlen_q, scores.seqlen_kv), block, **rule)


def _on_gpu(
    gpus: list[int],
    scores: ScoreShape,
    block: tuple[int, int],
    rule: Mapping[str, Any],
    given: Mapping[str, Any],
    stream: Any,
) -> list[Any]:
    gpu = gpus[0] if gpus else _current_gpu()
    import cupy

    with entered(gpu, stream), captures.captured_call():
        mask = rule_array("mask", rule["mask"], cpu=False)
        mods = {name: rule_array(f"mod_args[{name!r}]", x, cpu=False) for name, x in given.items()}
        asked = _asked(scores, block, rule["mask_mod"], mask, mods)
        arrays = empty_lists(asked, cupy.empty)
        everything = arrays | ({} if mask is None else {"mask": mask})
        addresses = {name: x.data.ptr for name, x in everything.items()}
        launch = launch_of(asked, addresses, [x.data.ptr for x in mods.values()])
        if launch is not None:
            kernel = load_kernel(launch.config, place_of(gpu))
            launch_steps((step_of(kernel, launch),), everything | mods)
        return [arrays[name] for name in LISTS]


def _current_gpu() -> int:
    """The GPU that asks an expression; ``TypeError`` if there is none."""
    try:
        import cupy

        return int(cupy.cuda.runtime.getDevice())
    except Exception as reason:  # CuPy is missing, or its driver, or a GPU
        raise TypeError(
            f"mask_mod: got a str, which a GPU asks, and there is none ({reason}); pass a callable "
            f"mask_mod(b, h, q_idx, kv_idx, **mod_args)"
        ) from reason


def _asked(
    scores: ScoreShape, block: tuple[int, int], mask_mod: Any, mask: Any, mods: Mapping[str, Any]
) -> Asked:
    described = describe_mods(None, mask_mod, {name: spec_of(x) for name, x in mods.items()})
    shape = None if mask is None else _MASK.describe(spec_of(mask), scores, "float16")
    return Asked(scores, block, described, shape)


def _on_host(
    scores: ScoreShape,
    block: tuple[int, int],
    mask_mod: Any,
    mask: Any,
    given: Mapping[str, Any],
) -> list[Any]:
    from flashcore_cupy.cpu.numpy_rules import NumpyRules, Sizes

    mods = {name: rule_array(f"mod_args[{name!r}]", x, cpu=True) for name, x in given.items()}
    check_mods(None, mask_mod, mods)
    mask = rule_array("mask", mask, cpu=True)
    sizes = Sizes(scores.batch, scores.heads, scores.heads, scores.seqlen_q, scores.seqlen_kv, 1, 1)
    rules = NumpyRules(sizes, mask_mod=mask_mod, mask=mask, mod_args=mods)
    shape = tuple(-(-n // size) for n, size in zip(scores[2:], block, strict=True))
    states = np.zeros((2, scores.batch, scores.heads, *shape), np.bool_)
    for b, h, row in np.ndindex(scores.batch, scores.heads, shape[0]):
        first, end = row * block[0], min((row + 1) * block[0], scores.seqlen_q)
        queries = np.arange(first, end)
        at = Block(b, h, queries, first, end - 1, slice(0, scores.seqlen_kv))
        seen = rules.visible(at)
        starts = np.arange(0, scores.seqlen_kv, block[1])
        if not starts.size:
            continue
        some = np.logical_or.reduceat(seen.any(axis=0), starts)
        states[1, b, h, row] = np.logical_and.reduceat(seen.all(axis=0), starts)
        states[0, b, h, row] = some & ~states[1, b, h, row]
    return [x for state in states for x in block_lists.packed(state, np)]
