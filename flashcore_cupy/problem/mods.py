"""score_mod and mask_mod: the user's own formulas, as CUDA expressions or as Python functions."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from flashcore_cupy.problem.blocks import Around, Array, Block, BoolArray
from flashcore_cupy.problem.dual import Dual, NotDifferentiable
from flashcore_cupy.problem.mod_elements import Watched, indices
from flashcore_cupy.problem.rule import Slopes
from flashcore_cupy.problem.values import shown

ScoreMod: TypeAlias = Callable[..., Any]
MaskMod: TypeAlias = Callable[..., Any]

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
class Mods:
    """The user's expressions, and the names and dtypes of the arrays that they use."""

    score_mod: str | None
    mask_mod: str | None
    args: tuple[tuple[str, str], ...] = ()

    def mask_asks(self, variable: str) -> bool:
        """Whether mask_mod may depend on a variable: its name stands somewhere in the text."""
        return bool(re.search(rf"\b{variable}\b", self.mask_mod or "", re.ASCII))

    def elements(self, names: Iterable[str]) -> tuple[tuple[str, str], ...]:
        """What score_mod reads of these arrays: the array's name and an index, each pair once."""
        score_mod = self.score_mod or ""
        return tuple((name, index) for name in names for index in indices(score_mod, name))

    def header(
        self,
        grad: str | None = None,
        *,
        differentiated: bool = False,
        by: tuple[tuple[str, str], ...] = (),
    ) -> str:
        """The text that stands in for ``kernels/flashcore/rules/mods.cuh``.

        ``differentiated``: score_mod of a ``Dual``, too, which carries its derivative; ``grad``:
        the user's expression for that. ``by``: some of ``elements``, by each of which there is a
        score_mod that carries its derivative.
        """
        arrays = self._arrays()
        first = "const ModArgs& args, "
        score = _function(
            "float score_mod", f"{first}float score, ", arrays, self.score_mod, "score"
        )
        mask = _function("bool mask_mod", first, arrays, self.mask_mod, "true")
        include = "#include <flashcore/rules/mod_array.cuh>\n"
        if differentiated:
            include = f"#include <flashcore/rules/dual.cuh>\n{include}"
            score += self._of_dual(arrays, grad)
        count = f"constexpr int MOD_ELEMENTS = {len(by)};\n"
        score += "".join(self._by_element(n, *element) for n, element in enumerate(by))
        return (
            f"#pragma once\n{include}namespace flashcore {{\n{count}{score}{mask}}}"
            "  // namespace flashcore\n"
        )

    def _arrays(self, name: str = "", seed: str = "") -> str:
        """The arrays, as variables; of one of them an element may be what is differentiated by."""
        lines = []
        for number, (own, dtype) in enumerate(self.args):
            plain, x = f"ModArray<{MOD_TYPES[dtype]}>", MOD_TYPES[dtype]
            made = f"{{static_cast<const {x}*>(args[{number}])}}"
            if own == name:
                plain, made = f"SeededArray<{x}>", f"{{{made}, {seed}}}"
            lines.append(f"    [[maybe_unused]] const {plain} {own} = {made};\n")
        return "".join(lines)

    def _by_element(self, number: int, name: str, index: str) -> str:
        """Which element it is, and score_mod with its derivative by that."""
        tag = f"Element<{number}>"
        arrays = "    [[maybe_unused]] const Dual score = value;\n" + self._arrays(
            name, f"mod_element({tag}{{}}, b, h)"
        )
        first = f"{tag}, const ModArgs& args, float value, "
        return (
            f"__device__ __forceinline__ int64 mod_element({tag}, int b, int h) {{\n    return (\n"
            f'#line 1 "score_mod"\n{index}\n#line 1 "mods.cuh"\n    );\n}}\n'
            + _function("Dual score_mod_by", first, arrays, self.score_mod, "score")
        )

    def _of_dual(self, arrays: str, grad: str | None) -> str:
        first = "const ModArgs& args, "
        if grad is None:
            return _function(
                "Dual score_mod", f"{first}Dual score, ", arrays, self.score_mod, "score"
            )
        return _function("float score_mod_grad", f"{first}float score, ", arrays, grad, "1.0f") + (
            "__device__ __forceinline__ Dual score_mod(const ModArgs& args, Dual score, int b, "
            "int h, int q_idx, int kv_idx) {\n"
            "    const float slope = score_mod_grad(args, score.value, b, h, q_idx, kv_idx);\n"
            "    return score.then(score_mod(args, score.value, b, h, q_idx, kv_idx), slope);\n}\n"
        )


def _function(name: str, first: str, arrays: str, expression: str | None, default: str) -> str:
    # #line, so that the compiler's messages count the lines of the user's own text.
    place = name.split()[1].removesuffix("_by")
    return (
        f"__device__ __forceinline__ {name}({first}int b, int h, int q_idx, "
        f"int kv_idx) {{\n{arrays}    return (\n"
        f'#line 1 "{place}"\n{default if expression is None else expression}\n'
        '#line 1 "mods.cuh"\n    );\n}\n'
    )


def describe_mods(score_mod: Any, mask_mod: Any, mod_args: Mapping[str, Any]) -> Mods | None:
    """Check a GPU's mods and their arrays; None if there are none."""
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


def _numbers(result: Any) -> Array:
    """What a score_mod returned; ``TypeError`` unless that is numbers, or an array of them."""
    return _returned("score_mod", result, "the block's new scores, real numbers", _is_real)


def _flags(result: Any, shape: tuple[int, ...]) -> BoolArray:
    flags = _returned("mask_mod", result, "booleans, True where a query attends", _is_bool)
    return _fitted("mask_mod", flags, shape)


def _is_real(dtype: np.dtype[Any]) -> bool:
    # The float types that NumPy does not know itself, such as bfloat16, are of kind V, as records.
    return dtype.kind in "iuf" or (dtype.kind == "V" and "float" in dtype.name)


def _is_bool(dtype: np.dtype[Any]) -> bool:
    return dtype.kind == "b"


def _returned(
    name: str, result: Any, wanted: str, is_right: Callable[[np.dtype[Any]], bool]
) -> Array:
    try:
        # A masked array loses its mask like this.
        array = None if isinstance(result, np.ma.MaskedArray) else np.asarray(result)
    except Exception as error:  # of whatever the user returned: a ragged list, a traced array
        raise TypeError(f"{name}: returned {shown(result)}; return {wanted}") from error
    if array is None or not is_right(array.dtype):
        kind = "" if array is None or array.dtype == object else f", dtype {array.dtype.name}"
        raise TypeError(f"{name}: returned {shown(result)}{kind}; return {wanted}")
    return array


def _fitted(name: str, result: Array, shape: tuple[int, ...]) -> Array:
    try:
        return np.broadcast_to(result, shape)
    except ValueError:
        got = result.shape
        raise ValueError(f"{name}: returned shape {got}; return the block's, {shape}") from None


def check_mods(score_mod: Any, mask_mod: Any, mod_args: Mapping[str, Any] | None) -> None:
    """Raise ``TypeError`` unless these are None, or callables that take what they will be given."""
    _check_callable("score_mod", score_mod, "score, ", mod_args)
    _check_callable("mask_mod", mask_mod, "", mod_args)


def check_score_mod_grad(
    grad: Any, score_mod: Any, mod_args: Mapping[str, Any] | None, *, in_kernel: bool
) -> None:
    """Check a derivative: ``TypeError`` or ``ValueError`` unless it can be the score_mod's."""
    if grad is None:
        return
    if score_mod is None:
        raise ValueError("score_mod_grad: given without a score_mod that it is the derivative of")
    if not in_kernel:
        _check_callable("score_mod_grad", grad, "score, ", mod_args)
    elif not isinstance(grad, str) or not grad.strip():
        got = "a Python function" if callable(grad) else shown(grad)
        raise TypeError(
            f"score_mod_grad: got {got}; a kernel takes a CUDA expression as a string, as for "
            f"score_mod"
        )


def _check_callable(name: str, mod: Any, first: str, mod_args: Mapping[str, Any] | None) -> None:
    if mod is None:
        return
    call = f"{name}({first}b, h, q_idx, kv_idx, **mod_args)"
    if not callable(mod):
        raise TypeError(
            f"{name}: got {type(mod).__name__}; on NumPy arrays pass a callable, {call}"
            + (", or name a kernel, which takes an expression" if isinstance(mod, str) else "")
        )
    import inspect  # which takes as long to import as all else here

    try:
        signature = inspect.signature(mod)
    except (TypeError, ValueError):  # a function of C need not tell
        return
    try:
        signature.bind(*[None] * (4 + len(first.split())), **(mod_args or {}))
    except TypeError as error:
        raise TypeError(f"{name}: cannot be called as {call}: {error}") from None


def apply_score_mod(mod: ScoreMod, scores: Array, at: Block, around: Around) -> None:
    """Have a function change a block's scores, in place."""
    given = around.number(at.batch), at.head, at.q_idx, at.kv_idx
    result = _numbers(mod(scores, *given, **(around.mod_args or {})))
    scores[...] = _fitted("score_mod", result, scores.shape)


def linearize_score_mod(mod: ScoreMod, scores: Array, at: Block, around: Around) -> Slopes:
    """``apply_score_mod``; return the derivatives of the scores, (M, N).

    By what they were, and by each element that the function reads of ``around.mod_gradients``: for
    that it is called once more for each.
    """
    elements = _by_elements(mod, scores, at, around) if around.mod_gradients else {}
    given = around.number(at.batch), at.head, at.q_idx, at.kv_idx
    mod_args = around.mod_args or {}
    if around.score_mod_grad is not None:
        result = around.score_mod_grad(scores.copy(), *given, **mod_args)
        slope = _returned("score_mod_grad", result, "the derivatives, real numbers", _is_real)
        apply_score_mod(mod, scores, at, around)
        return Slopes(_fitted("score_mod_grad", slope, scores.shape).astype(scores.dtype), elements)
    try:
        result = mod(Dual(scores, 1.0), *given, **mod_args)
    except NotDifferentiable as reason:
        raise TypeError(
            f"score_mod: its derivative is not known, because of {reason}; pass it as "
            f"score_mod_grad, which takes the same arguments"
        ) from None
    new, slope = _value_and_slope(result, scores)
    scores[...] = new
    return Slopes(slope, elements)


def _by_elements(
    mod: ScoreMod, scores: Array, at: Block, around: Around
) -> dict[tuple[str, int], Array]:
    """The derivatives of the scores that a function makes, by elements of mod_args."""
    given = around.number(at.batch), at.head, at.q_idx, at.kv_idx
    watched = Watched(around.mod_args or {}, around.mod_gradients)

    def slope(seed: tuple[str, int] | None = None) -> Array:
        result = mod(Dual(scores.copy(), 0.0), *given, **watched.arrays(seed))
        return _value_and_slope(result, scores)[1]

    try:
        slope()  # notes which elements are read
        return {element: slope(element) for element in watched.read}
    except NotDifferentiable as reason:
        raise TypeError(
            f"score_mod: its derivative by mod_args is not known, because of {reason}; write it by "
            f"NumPy's elementwise functions, and read elements"
        ) from None


def _value_and_slope(result: Any, scores: Array) -> tuple[Array, Array]:
    """What a score_mod has returned for a dual."""
    new = result if isinstance(result, Dual) else Dual(_numbers(result), 0.0)
    slope = _fitted("score_mod", new.derivative, scores.shape).astype(scores.dtype)
    return _fitted("score_mod", _numbers(new.value), scores.shape), slope


def flags_of_mask_mod(mod: MaskMod, at: Block, around: Around) -> BoolArray:
    """Ask a function where a block's queries see its keys."""
    given = around.number(at.batch), at.head, at.q_idx, at.kv_idx
    return _flags(mod(*given, **(around.mod_args or {})), at.shape)
