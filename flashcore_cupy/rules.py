"""What scores go through besides their scale: checked, and described without any data.

Nothing here needs a GPU or CuPy: an array is looked at through ``shape``, ``dtype``, ``strides``,
and an ``address``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from flashcore_cupy.values import check_number, shown

#: A window this wide hides nothing: sequences are not longer (problem.MAX_SEQLEN).
UNBOUNDED_WINDOW = 2**30
#: float32's largest number: a cap beyond it caps nothing.
_FLOAT32_MAX = 3.4028234663852886e38
#: A smaller cap makes no difference to a softmax, which it makes uniform; its inverse is finite.
_LEAST_SOFTCAP = 1e-30
#: Arrays that a score_mod and a mask_mod may use; mods.cuh has the same.
MAX_MOD_ARGS = 8
#: dtypes of mod_args, and what they are called in a kernel.
MOD_TYPES = {
    "float16": "half_t",
    "bfloat16": "bfloat16_t",
    "float32": "float",
    "bool": "uint8",
    "uint8": "uint8",
    "int8": "signed char",
    "int16": "short",
    "int32": "int",
    "int64": "int64",
}
_VARIABLES = ("score", "b", "h", "q_idx", "kv_idx")
# Of C++17, and what a generated function calls its arrays.
_TAKEN_NAMES = """
    args alignas alignof and and_eq asm auto bitand bitor bool break case catch char char16_t
    char32_t class compl const const_cast constexpr continue decltype default delete do double
    dynamic_cast else enum explicit export extern false float for friend goto if inline int long
    mutable namespace new noexcept not not_eq nullptr operator or or_eq private protected public
    register reinterpret_cast return short signed sizeof static static_assert static_cast struct
    switch template this thread_local throw true try typedef typeid typename union unsigned
    using virtual void volatile wchar_t while xor xor_eq
"""


@dataclass(frozen=True)
class Broadcast:
    """An array that is broadcast to (B, Hq, Sq, Skv)."""

    dtype: str
    strides: tuple[int, int, int, int]
    """Elements; 0 along an axis that the array lacks."""
    pairs: bool
    """Two neighbouring keys can be loaded at once."""
    chunks: bool = False
    """Of a mask: 16 of them can."""


@dataclass(frozen=True)
class Mods:
    """The user's expressions, and the names and dtypes of the arrays that they use."""

    score_mod: str | None
    mask_mod: str | None
    args: tuple[tuple[str, str], ...] = ()

    def header(self) -> str:
        """The text that stands in for ``kernels/flashcore/rules/mods.cuh``."""
        arrays = "".join(
            f"    [[maybe_unused]] const ModArray<{MOD_TYPES[dtype]}> {name} = "
            f"{{static_cast<const {MOD_TYPES[dtype]}*>(args[{index}])}};\n"
            for index, (name, dtype) in enumerate(self.args)
        )
        score = _function("float score_mod", "float score, ", arrays, self.score_mod, "score")
        mask = _function("bool mask_mod", "", arrays, self.mask_mod, "true")
        return (
            "#pragma once\n#include <flashcore/rules/mod_array.cuh>\n"
            f"namespace flashcore {{\n{score}{mask}}}  // namespace flashcore\n"
        )


def _function(name: str, first: str, arrays: str, expression: str | None, default: str) -> str:
    # #line, so that the compiler's messages count the lines of the user's own text.
    place = name.split()[1]
    return (
        f"__device__ __forceinline__ {name}(const ModArgs& args, {first}int b, int h, int q_idx, "
        f"int kv_idx) {{\n{arrays}    return (\n"
        f'#line 1 "{place}"\n{default if expression is None else expression}\n'
        '#line 1 "mods.cuh"\n    );\n}\n'
    )


@dataclass(frozen=True)
class Rules:
    """The rules of one call; hashable, so that they can key a cache."""

    window: tuple[int, int] = (-1, -1)
    """Keys to the left and to the right of a query's own position; -1 is no bound."""
    softcap: float = 0.0
    alibi: tuple[int, int] | None = None
    """Element strides of the slopes along batches and heads."""
    bias: Broadcast | None = None
    mask: Broadcast | None = None
    sink: bool = False
    mods: Mods | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The arguments, beyond the window, that are not at their defaults."""
        given = {
            "softcap": self.softcap != 0,
            "alibi_slopes": self.alibi is not None,
            "bias": self.bias is not None,
            "score_mod": self.mods is not None and self.mods.score_mod is not None,
            "mask": self.mask is not None,
            "mask_mod": self.mods is not None and self.mods.mask_mod is not None,
            "sink": self.sink,
        }
        return tuple(name for name, present in given.items() if present)

    @property
    def differ_by_head(self) -> bool:
        """Whether keys may be hidden from one query head and not from another."""
        mask_mod = self.mods is not None and self.mods.mask_mod is not None
        return mask_mod or (self.mask is not None and self.mask.strides[1] != 0)


NO_RULES = Rules()


class Scores(NamedTuple):
    """Sizes of the scores that rules apply to."""

    batch: int
    heads: int
    seqlen_q: int
    seqlen_kv: int


def describe_rules(
    sizes: Scores,
    dtype: str,
    *,
    window: Any = (-1, -1),
    softcap: Any = 0.0,
    alibi_slopes: Any = None,
    bias: Any = None,
    mask: Any = None,
    sink: Any = None,
    score_mod: Any = None,
    mask_mod: Any = None,
    mod_args: Mapping[str, Any] | None = None,
    packed: bool = False,
) -> Rules:
    """Check every rule of a call and describe it.

    Arrays come as ``ArraySpec`` or anything with shape, strides, dtype and address; ``dtype`` is
    q's. Raises ``TypeError`` or ``ValueError`` naming the argument, what it got and what works.
    """
    if packed and (bias is not None or mask is not None):
        name = "bias" if bias is not None else "mask"
        raise ValueError(
            f"{name}: not with cu_seqlens, whose sequences have no common shape; "
            f"use {'score_mod' if name == 'bias' else 'mask_mod'} with mod_args"
        )
    return Rules(
        window=check_window(window),
        softcap=check_softcap(softcap),
        alibi=None if alibi_slopes is None else _alibi(alibi_slopes, sizes),
        bias=None if bias is None else _bias(bias, sizes, dtype),
        mask=None if mask is None else _mask(mask, sizes),
        sink=sink is not None and _sink(sink, sizes),
        mods=_mods(score_mod, mask_mod, mod_args or {}),
    )


def check_window(window: Any) -> tuple[int, int]:
    """Return (left, right), -1 for a side that hides nothing."""
    wrong = (
        f"window: got {shown(window)}; use (left, right), each an int from 0, or -1 for no bound"
    )
    if not isinstance(window, tuple | list) or len(window) != 2:
        raise ValueError(wrong)
    sides = []
    for side in window:
        try:
            n = side.__index__()
        except Exception:  # of no integer, or of an array of any library that is none
            raise ValueError(wrong) from None
        if isinstance(side, bool) or n < -1:
            raise ValueError(wrong)
        sides.append(-1 if n >= UNBOUNDED_WINDOW else n)
    return sides[0], sides[1]


def check_softcap(softcap: Any) -> float:
    """Return the cap as a float, 0 for none, which infinity is, too."""
    cap = check_number("softcap", softcap, "0 for none")
    if not cap >= 0:  # so written that NaN fails
        raise ValueError(f"softcap: got {shown(cap)}; use a positive number, or 0 for none")
    if cap == 0 or cap > _FLOAT32_MAX:
        return 0.0
    return max(float(cap), _LEAST_SOFTCAP)


def _alibi(slopes: Any, sizes: Scores) -> tuple[int, int]:
    allowed = ((sizes.heads,), (sizes.batch, sizes.heads))
    if tuple(slopes.shape) not in allowed:
        raise ValueError(
            f"alibi_slopes: got shape {tuple(slopes.shape)}; use (Hq,) = {allowed[0]} or "
            f"(B, Hq) = {allowed[1]}"
        )
    if slopes.dtype.name != "float32":
        raise TypeError(f"alibi_slopes: got dtype {slopes.dtype.name}; use float32")
    strides = [s // slopes.dtype.itemsize for s in slopes.strides]
    return (0, strides[0]) if len(strides) == 1 else (strides[0], strides[1])


def _bias(bias: Any, sizes: Scores, dtype: str) -> Broadcast:
    if bias.dtype.name not in (dtype, "float32"):
        wanted = "q's, float32" if dtype == "float32" else f"q's, {dtype}, or float32"
        raise TypeError(f"bias: got dtype {bias.dtype.name}; use {wanted}")
    return _broadcast("bias", bias, sizes)


def _mask(mask: Any, sizes: Scores) -> Broadcast:
    if mask.dtype.name != "bool":
        raise TypeError(
            f"mask: got dtype {mask.dtype.name}; use bool, True where a query attends "
            f"(an additive mask is a bias)"
        )
    return _broadcast("mask", mask, sizes)


def _broadcast(name: str, x: Any, sizes: Scores) -> Broadcast:
    target, shape = tuple(sizes), tuple(x.shape)
    lacking = 4 - len(shape)
    fits = lacking >= 0 and all(
        n in (1, wanted) for n, wanted in zip(shape, target[lacking:], strict=True)
    )
    if not fits:
        raise ValueError(
            f"{name}: got shape {shape}, which does not broadcast to (B, Hq, Sq, Skv) = {target}"
        )
    size = x.dtype.itemsize
    own = [0 if n == 1 else s // size for n, s in zip(shape, x.strides, strict=True)]
    strides = (*(0,) * lacking, *own)

    def loads(keys: int) -> bool:
        aligned = x.address % (keys * size) == 0 and all(s % keys == 0 for s in strides[:3])
        return aligned and strides[3] == 1 and sizes.seqlen_kv % keys == 0

    chunks = size == 1 and loads(16)
    return Broadcast(x.dtype.name, strides, loads(2), chunks)  # type: ignore[arg-type]


def _sink(sink: Any, sizes: Scores) -> bool:
    if tuple(sink.shape) != (sizes.heads,):
        raise ValueError(f"sink: got shape {tuple(sink.shape)}; use (Hq,) = ({sizes.heads},)")
    if sink.dtype.name != "float32":
        raise TypeError(f"sink: got dtype {sink.dtype.name}; use float32")
    return True


def _mods(score_mod: Any, mask_mod: Any, mod_args: Mapping[str, Any]) -> Mods | None:
    for name, mod in (("score_mod", score_mod), ("mask_mod", mask_mod)):
        if mod is None or (isinstance(mod, str) and mod.strip()):
            continue
        got = "a Python function" if callable(mod) else shown(mod)
        raise TypeError(
            f"{name}: got {got}; on a GPU use a CUDA expression as a string, for example "
            + ("'score + 0.1f * (kv_idx - q_idx)'" if name == "score_mod" else "'kv_idx % 2 == 0'")
        )
    check_mod_args(mod_args, score_mod, mask_mod)
    if score_mod is None and mask_mod is None:
        return None
    if len(mod_args) > MAX_MOD_ARGS:
        raise ValueError(f"mod_args: got {len(mod_args)} arrays; at most {MAX_MOD_ARGS}")
    return Mods(score_mod, mask_mod, tuple(_mod_arg(name, x) for name, x in mod_args.items()))


def check_mod_args(mod_args: Any, score_mod: Any, mask_mod: Any) -> None:
    """Check that these are arrays by name, and that one of the mods may use them."""
    if not isinstance(mod_args, Mapping):
        raise TypeError(f"mod_args: got {type(mod_args).__name__}; use a dict of names and arrays")
    if mod_args and score_mod is None and mask_mod is None:
        raise ValueError("mod_args: given without a score_mod or a mask_mod that uses them")
    for name in mod_args:
        if not isinstance(name, str) or not name.isidentifier() or not name.isascii():
            raise ValueError(f"mod_args: got the name {shown(name)}; use an identifier of C++")
        if name in _VARIABLES or name in _TAKEN_NAMES.split():
            raise ValueError(f"mod_args: the name {name!r} is taken; use another one")


def _mod_arg(name: str, x: Any) -> tuple[str, str]:
    if x.dtype.name not in MOD_TYPES:
        raise TypeError(
            f"mod_args: {name} has dtype {x.dtype.name}; use one of {', '.join(MOD_TYPES)}"
        )
    if math.prod(x.shape) == 0:
        raise ValueError(f"mod_args: {name} has no elements")
    step = x.dtype.itemsize
    for n, stride in zip(reversed(x.shape), reversed(x.strides), strict=True):
        if n != 1 and stride != step:
            raise ValueError(
                f"mod_args: {name} is not C-contiguous (strides {tuple(x.strides)} bytes); "
                f"expressions index it by element, so pass a contiguous copy"
            )
        step *= n
    return name, x.dtype.name
