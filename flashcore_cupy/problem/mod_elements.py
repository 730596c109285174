"""Gradients of ``mod_args``: which elements of an array a score_mod reads, and what they change.

An element has a gradient where its index depends on nothing but the batch and the head: then all
queries and keys of a head add to it, as to a slope or a sink. What differs from one query or key to
the next is a bias. An expression tells its elements by the text of its indices, ``table[2 * h]``; a
Python function by what it asks of an array that stands in for the caller's.
"""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from flashcore_cupy.problem.blocks import Array
from flashcore_cupy.problem.dual import Dual, NotDifferentiable

#: What the name of an array of mod_args begins with, where it stands beside "q" and "bias".
MOD_ARGS = "mod_args."
_FLOATS = ("float16", "bfloat16", "float32", "float64")
_COMMENTS = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
# Not behind a digit, a dot or a letter: those are of a number, or of another name.
_NAMES = re.compile(r"(?<![\w.])[A-Za-z_]\w*")
_WHAT_WORKS = (
    "index it by b, h and integers, give what differs by query or key as bias=, or ask for no "
    "gradient of it"
)


def label(name: str) -> str:
    """How a message calls an array: mod_args['table'] for "mod_args.table"."""
    return f"mod_args[{name.removeprefix(MOD_ARGS)!r}]" if name.startswith(MOD_ARGS) else name


def mod_args_among(names: Any) -> tuple[str, ...]:
    """The arrays of mod_args, as their caller calls them, among names of inputs."""
    return tuple(name.removeprefix(MOD_ARGS) for name in names if name.startswith(MOD_ARGS))


def check_differentiated(name: str, dtype: str, score_mod: Any) -> None:
    """Raise ``ValueError`` or ``TypeError`` for an array of mod_args that has no gradient.

    What a Python function does with it is found out when that is called.
    """
    if score_mod is None:
        raise ValueError(f"{label(name)}: has no gradient without a score_mod, which may use it")
    if dtype not in _FLOATS:
        raise TypeError(
            f"{label(name)}: got dtype {dtype}, which has no gradient; use one of "
            f"{', '.join(_FLOATS[:3])}"
        )
    if isinstance(score_mod, str):
        indices(score_mod, name.removeprefix(MOD_ARGS))


@functools.lru_cache(maxsize=4096)
def indices(expression: str, name: str) -> tuple[str, ...]:
    """The indices by which a CUDA expression reads an array, each once.

    ``ValueError`` for one that is not made of b, h and integers.
    """
    text = _COMMENTS.sub(" ", expression)
    found = []
    for use in re.finditer(rf"(?<![\w.]){name}\b\s*(\[?)", text):
        if not use[1]:
            raise ValueError(f"{label(MOD_ARGS + name)}: score_mod uses it whole; {_WHAT_WORKS}")
        index = " ".join(_bracketed(text, use.end()).split())
        others = [x for x in _NAMES.findall(index) if x not in ("b", "h")]
        if others:
            raise ValueError(
                f"{label(MOD_ARGS + name)}: score_mod reads {name}[{index}], whose gradient is not "
                f"known, because of {others[0]}; {_WHAT_WORKS}"
            )
        found.append(index)
    return tuple(dict.fromkeys(found))


def _bracketed(text: str, start: int) -> str:
    """What stands behind an opening bracket, up to the closing one; all, if there is none."""
    depth = 1
    for at in range(start, len(text)):
        depth += {"[": 1, "]": -1}.get(text[at], 0)
        if depth == 0:
            return text[start:at]
    return text[start:]


class Elements(NDArrayOperatorsMixin):
    """Stands in for an array of mod_args: notes which elements are read, and makes duals of them.

    ``of``: their numbers in C order. ``seed``: the one that is differentiated by.
    """

    def __init__(
        self, name: str, value: Array, of: Array, read: dict[int, None], seed: int | None
    ) -> None:
        self._name, self._value, self._of, self._read, self._seed = name, value, of, read, seed

    shape = property(lambda self: self._value.shape)
    dtype = property(lambda self: self._value.dtype)
    ndim = property(lambda self: self._value.ndim)
    size = property(lambda self: self._value.size)

    def __len__(self) -> int:
        return len(self._value)

    def __getitem__(self, at: Any) -> Any:
        index = tuple(map(self._integer, at if isinstance(at, tuple) else (at,)))
        value, of = self._value[index], self._of[index]
        if np.ndim(of):
            return Elements(self._name, value, of, self._read, self._seed)
        self._read[int(of)] = None
        return Dual(value, float(of == self._seed))

    def _integer(self, index: Any) -> int:
        try:
            return operator.index(index)
        except TypeError:
            shape = getattr(index, "shape", ())
            got = f"an array of shape {shape}" if shape else type(index).__name__
            raise ValueError(
                f"{label(MOD_ARGS + self._name)}: score_mod reads it at {got}, where its gradient "
                f"is not known; {_WHAT_WORKS}"
            ) from None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # protocols are asked for, and may be missing
            raise AttributeError(name)
        raise NotDifferentiable(f"{label(MOD_ARGS + self._name)}.{name}")

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise NotDifferentiable(f"{label(MOD_ARGS + self._name)}, which it uses whole")

    __array__ = __array_ufunc__ = __array_function__ = _refuse


class Watched:
    """The arrays of mod_args as a score_mod gets them: some of them note what is read."""

    def __init__(self, mod_args: Mapping[str, Any], names: tuple[str, ...]) -> None:
        self._mod_args, self._names = mod_args, names
        self._read: dict[str, dict[int, None]] = {name: {} for name in names}

    def arrays(self, seed: tuple[str, int] | None = None) -> dict[str, Any]:
        """Them; ``seed``: the name and the number of the element that is differentiated by."""
        watched = {}
        for name in self._names:
            value = np.asarray(self._mod_args[name])
            own = seed[1] if seed is not None and seed[0] == name else None
            all_of = np.arange(value.size).reshape(value.shape)
            watched[name] = Elements(name, value, all_of, self._read[name], own)
        return {**self._mod_args, **watched}

    @property
    def read(self) -> list[tuple[str, int]]:
        """The elements that were read so far, by name and number."""
        return [(name, number) for name, numbers in self._read.items() for number in numbers]
