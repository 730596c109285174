"""A call's rules as a launch cache sees them: what keys a call, and which arrays it brings.

Only what is cheap to look at is taken: arrays, expressions, a block mask's lists, a key of
dropout's. All else takes the long way, which converts it or says what is wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from flashcore_cupy.launch import tensors
from flashcore_cupy.problem.attention_problem import MAX_ALIGN
from flashcore_cupy.problem.block_lists import InKernel
from flashcore_cupy.problem.block_mask import BlockMask
from flashcore_cupy.problem.listed_blocks import LISTS
from flashcore_cupy.problem.rules import RULES


class TakenApart(NamedTuple):
    """The rules of a call."""

    settled: tuple[Any, ...]
    """All that is not an array: expressions, the sizes of a block mask."""
    names: tuple[str, ...]
    """Of the arrays: a rule's, one of ``LISTS``, or "mod_args.table"."""
    arrays: tuple[Any, ...]
    rng: tuple[int, int] | None
    """Seed and offset, if they are not in an array; they are not part of the key."""

    @property
    def key(self) -> tuple[Any, ...]:
        """What a call is known by, but for its arrays."""
        return self.settled, self.names, self.rng is None


NO_RULES: Mapping[str, Any] = {}
NOTHING = TakenApart((), (), (), None)


def take_apart(rules: Mapping[str, Any]) -> TakenApart | None:
    """Look at rules by the names that ``attention`` has for them; None for the long way."""
    if not rules:
        return NOTHING
    settled: list[Any] = []
    found: dict[str, Any] = {}
    rng = None
    for name, x in rules.items():
        if x is None:
            continue
        kind = x.__class__
        if name == "block_mask":
            if not _take_block_mask(x, rules, settled, found):
                return None
        elif name == "mod_args":
            if kind is not dict or not _take_mod_args(x, found):
                return None
        elif kind is str:
            settled.append((name, x))
        elif name == "rng" and (kind is tuple or kind is list):
            if not _is_key(x):
                return None
            rng = x[0], x[1]
        else:
            found[name] = x
    return TakenApart(tuple(settled), tuple(found), tuple(found.values()), rng)


def _take_block_mask(
    mask: Any, rules: Mapping[str, Any], settled: list[Any], found: dict[str, Any]
) -> bool:
    if mask.__class__ is not BlockMask:
        return _take_flex(mask, settled, found)
    settled.append(("block_mask", mask.block, mask.seqlens, mask.rule_heads))
    found.update({name: mask.arrays[name] for name in LISTS if name in mask.arrays})
    if rules.get("mask_mod") is None and rules.get("mask") is None:  # its own rule
        own = mask.mask_mod
        if own is not None:
            own = own.cuda if own.__class__ is InKernel else own
            if own.__class__ is not str:
                return False
            settled.append(own)
            if mask.mod_args and not _take_mod_args(mask.mod_args, found):
                return False
        if mask.mask is not None:
            found["mask"] = mask.mask
    return True


def _take_flex(mask: Any, settled: list[Any], found: dict[str, Any]) -> bool:
    """A BlockMask of torch's, whose attributes say all that there is to know."""
    try:
        lists = {name: getattr(mask, name, None) for name in LISTS}
        size, lengths = mask.BLOCK_SIZE, mask.seq_lengths
        sizes = (*size, *lengths) if size.__class__ is tuple else (size, *lengths)
    except Exception:  # of an object that only looks like one
        return False
    if any(n.__class__ is not int for n in sizes):
        return False
    settled.append(("block_mask", sizes))
    found.update({name: x for name, x in lists.items() if x is not None})
    return True


def _take_mod_args(given: Mapping[str, Any], found: dict[str, Any]) -> bool:
    """Add mod_args; whether each name stands for one array."""
    for name, x in given.items():
        if name.__class__ is not str or x is None:
            return False
        if found.setdefault(f"mod_args.{name}", x) is not x:
            return False
    return True


def _is_key(rng: Any) -> bool:
    """Whether these are a seed and an offset."""
    return len(rng) == 2 and all(x.__class__ is int and 0 <= x < 2**64 for x in rng)


_POINTERS = {rule.name: rule.pointer for rule in RULES if rule.pointer is not None}
_POINTERS |= {name: name for name in (*LISTS, "rng", "cu_seqlens_q")}
_POINTERS["cu_seqlens_k"] = "cu_seqlens_kv"


def pointers_of(taken: TakenApart, mod_args: Iterable[str]) -> list[str]:
    """By which names a bound call has these arrays; ``mod_args``: their names, in its order."""
    order = list(mod_args)
    return [
        f"mod_args[{order.index(name.removeprefix('mod_args.'))}]"
        if name.startswith("mod_args.")
        else _POINTERS[name]
        for name in taken.names
    ]


def form_of(x: Any, ndarray: Any) -> tuple[Any, ...]:
    """What a launch depends on of an array of CuPy's, ``ndarray``, or a tensor.

    Of the address only the alignment matters. A tuple of strides takes as long to make as all else
    here, and most arrays are contiguous. (That is CuPy's own name for it; the public
    flags.c_contiguous takes longer than the strides.)
    """
    if x.__class__ is ndarray:
        return x.shape, x._c_contiguous or x.strides, x.dtype, x.data.ptr % MAX_ALIGN
    return *tensors.form(x), x.data_ptr() % MAX_ALIGN


def address_of(x: Any, ndarray: Any) -> int:
    """Where an array of CuPy's, or a tensor, begins."""
    address: int = x.data.ptr if x.__class__ is ndarray else x.data_ptr()
    return address


def are_on(device: int, arrays: Iterable[Any], ndarray: Any) -> bool:
    """Whether these are arrays of CuPy's on a GPU; None is no array."""
    for x in arrays:
        if x is not None and (x.__class__ is not ndarray or x.data.device_id != device):
            return False
    return True
