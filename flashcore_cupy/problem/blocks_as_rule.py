"""A block mask as a rule of each element, for kernels that do not walk over its lists.

The backward kernels do not, so far. They look up the state of an element's block, and so compute
empty blocks as they compute full ones.
"""

from __future__ import annotations

from dataclasses import replace

from flashcore_cupy.problem.block_lists import module_of
from flashcore_cupy.problem.block_mask import BlockMask
from flashcore_cupy.problem.listed_blocks import FULL, MIXED, state_grid
from flashcore_cupy.problem.mods import MAX_MOD_ARGS
from flashcore_cupy.problem.request import Call, Request

_STATES, _MASK = "block_states", "block_mask_mask"  # names among mod_args
_INDICES = ("b", "h", "q_idx", "kv_idx")


def as_rule(request: Request, call: Call) -> Request:
    """The request with a mask_mod in place of its block mask.

    ``call``: what the request with the block mask has made, which has checked it. What the lists
    hold is looked at by enqueued work: a captured graph looks anew. Raises ``ValueError`` if
    mod_args has one of the names that are needed, or too many arrays.
    """
    lists, scores = call.lists, call.problem.scores
    assert lists is not None
    xp = module_of(next(iter(lists.arrays.values())))
    rules = BlockMask.of(request.rules["block_mask"]).beside(request.rules, in_kernel=True)
    del rules["block_mask"]
    mod_args = dict(rules.get("mod_args") or {})
    for name in (_STATES, _MASK):
        if name in mod_args:
            raise ValueError(f"mod_args: the name {name!r} is taken by the block mask")
    most = MAX_MOD_ARGS - (1 if rules.get("mask") is None else 2)
    if len(mod_args) > most:
        raise ValueError(
            f"mod_args: got {len(mod_args)} arrays; at most {most} for gradients through a block "
            f"mask"
        )
    states = xp.ascontiguousarray(state_grid(lists.arrays, lists.block, lists.seqlens, xp))
    if states.size == 0:  # there is no score either
        return replace(request, rules=rules)
    mod_args[_STATES] = states
    heads = scores.heads // states.shape[1]
    state = f"{_STATES}[{_place(states.shape, (1, heads, *lists.block))}]"
    asked = [f"{state} == {MIXED}"]
    if (mask_mod := rules.get("mask_mod")) is not None:
        asked.append(f"({mask_mod}\n)")  # which may end with a comment
    if rules.pop("mask", None) is not None:
        mask = xp.ascontiguousarray(call.arrays["mask"])
        mod_args[_MASK] = mask
        asked.append(f"{_MASK}[{_place((1,) * (4 - mask.ndim) + mask.shape, (1, 1, 1, 1))}]")
    rules["mask_mod"] = f"{state} == {FULL} || ({' && '.join(asked)})"
    rules["mod_args"] = mod_args
    return replace(request, rules=rules)


def _place(shape: tuple[int, ...], steps: tuple[int, ...]) -> str:
    """An expression: the element of a C-contiguous array that belongs to a score.

    An axis of length 1 has one element for all. ``steps``: how many neighbouring indices share an
    element, along each axis.
    """
    place = "0LL"
    for name, size, step in zip(_INDICES, shape, steps, strict=True):
        if size > 1:
            own = name if step == 1 else f"{name} / {step}"
            place = f"({place}) * {size} + {own}"
    return place
