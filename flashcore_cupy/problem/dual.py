"""Derivatives of a user's formula: evaluated on dual numbers, NumPy computes both at once.

A ``Dual`` stands in for the array of scores. Element by element it is x + x' e with e * e = 0
(forward differentiation; Griewank & Walther 2008, section 3.1), so the chain rule follows from how
each of NumPy's functions changes it. At a kink the derivative is one of the two sides', or 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from flashcore_cupy.problem.blocks import Array

Partial: TypeAlias = Callable[..., Any]
"""Of a function's result r and its arguments: the derivative by one of the arguments."""


class NotDifferentiable(TypeError):
    """A formula uses what has no derivative here; its text names that."""


def _gives(constant: float) -> Partial:
    return lambda r, *x: constant


def _log(x: Any) -> Any:
    """The logarithm of a power's base; 0 at a base of 0, where the power is flat."""
    return np.log(np.where(x == 0, 1, x))


_LN2, _LN10 = math.log(2.0), math.log(10.0)
#: By function: its derivatives by its first argument, and by its second.
PARTIALS: Mapping[np.ufunc, tuple[Partial, ...]] = {
    np.positive: (_gives(1),),
    np.negative: (_gives(-1),),
    np.add: (_gives(1), _gives(1)),
    np.subtract: (_gives(1), _gives(-1)),
    np.multiply: (lambda r, x, y: y, lambda r, x, y: x),
    np.true_divide: (lambda r, x, y: 1 / y, lambda r, x, y: -r / y),
    np.remainder: (_gives(1), lambda r, x, y: -np.floor_divide(x, y)),
    np.fmod: (_gives(1), lambda r, x, y: -np.trunc(x / y)),
    np.power: (
        lambda r, x, y: np.where(y == 0, 0, y * np.power(x, np.where(y == 0, 1, y - 1))),
        lambda r, x, y: r * _log(x),
    ),
    np.float_power: (
        lambda r, x, y: np.where(y == 0, 0, y * np.float_power(x, np.where(y == 0, 1, y - 1))),
        lambda r, x, y: r * _log(x),
    ),
    np.square: (lambda r, x: 2 * x,),
    np.sqrt: (lambda r, x: 0.5 / r,),
    np.cbrt: (lambda r, x: 1 / (3 * r * r),),
    np.reciprocal: (lambda r, x: -r * r,),
    np.exp: (lambda r, x: r,),
    np.exp2: (lambda r, x: r * _LN2,),
    np.expm1: (lambda r, x: r + 1,),
    np.log: (lambda r, x: 1 / x,),
    np.log2: (lambda r, x: 1 / (x * _LN2),),
    np.log10: (lambda r, x: 1 / (x * _LN10),),
    np.log1p: (lambda r, x: 1 / (1 + x),),
    np.logaddexp: (lambda r, x, y: np.exp(x - r), lambda r, x, y: np.exp(y - r)),
    np.logaddexp2: (lambda r, x, y: np.exp2(x - r), lambda r, x, y: np.exp2(y - r)),
    np.sin: (lambda r, x: np.cos(x),),
    np.cos: (lambda r, x: -np.sin(x),),
    np.tan: (lambda r, x: 1 + r * r,),
    np.arcsin: (lambda r, x: 1 / np.sqrt(1 - x * x),),
    np.arccos: (lambda r, x: -1 / np.sqrt(1 - x * x),),
    np.arctan: (lambda r, x: 1 / (1 + x * x),),
    np.arctan2: (lambda r, y, x: x / (x * x + y * y), lambda r, y, x: -y / (x * x + y * y)),
    np.hypot: (lambda r, x, y: x / r, lambda r, x, y: y / r),
    np.sinh: (lambda r, x: np.cosh(x),),
    np.cosh: (lambda r, x: np.sinh(x),),
    np.tanh: (lambda r, x: 1 - r * r,),
    np.arcsinh: (lambda r, x: 1 / np.sqrt(1 + x * x),),
    np.arccosh: (lambda r, x: 1 / np.sqrt(x * x - 1),),
    np.arctanh: (lambda r, x: 1 / (1 - x * x),),
    np.absolute: (lambda r, x: np.sign(x),),
    np.fabs: (lambda r, x: np.sign(x),),
    np.copysign: (lambda r, x, y: np.copysign(1, x) * np.copysign(1, y), _gives(0)),
    np.maximum: (lambda r, x, y: x >= y, lambda r, x, y: x < y),
    np.minimum: (lambda r, x, y: x <= y, lambda r, x, y: x > y),
    np.fmax: (lambda r, x, y: (x >= y) | np.isnan(y), lambda r, x, y: (x < y) | np.isnan(x)),
    np.fmin: (lambda r, x, y: (x <= y) | np.isnan(y), lambda r, x, y: (x > y) | np.isnan(x)),
}
#: What is constant between its steps: of these the values alone go on.
FLAT = frozenset(
    {np.floor, np.ceil, np.trunc, np.rint, np.sign, np.signbit, np.floor_divide, np.heaviside}
    | {np.equal, np.not_equal, np.less, np.less_equal, np.greater, np.greater_equal}
    | {np.isnan, np.isinf, np.isfinite, np.logical_and, np.logical_or, np.logical_not}
    | {np.logical_xor}
)


class Dual(NDArrayOperatorsMixin):
    """An array, and the derivative of each of its elements by the score."""

    def __init__(self, value: Any, derivative: Any) -> None:
        self.value: Array = np.asarray(value)
        self.derivative: Array = np.broadcast_to(derivative, self.value.shape)

    shape = property(lambda self: self.value.shape)
    dtype = property(lambda self: self.value.dtype)
    ndim = property(lambda self: self.value.ndim)
    size = property(lambda self: self.value.size)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # protocols are asked for, and may be missing
            raise AttributeError(name)
        raise NotDifferentiable(f"the method {name!r}")

    def __len__(self) -> int:
        return len(self.value)

    def __getitem__(self, at: Any) -> Dual:
        return Dual(self.value[at], self.derivative[at])

    def __setitem__(self, at: Any, given: Any) -> None:
        self.derivative = np.array(self.derivative)  # which may be a broadcast view
        self.value[at], self.derivative[at] = _parts(given)

    def __array__(self, *_: Any, **__: Any) -> Array:
        raise NotDifferentiable("a plain array that it makes of the scores")

    def astype(self, dtype: Any, **how: Any) -> Any:
        """Cast; integers and truths are constant between their steps."""
        cast = self.value.astype(dtype, **how)
        is_flat = cast.dtype.kind in "biu"
        return cast if is_flat else Dual(cast, self.derivative.astype(dtype))

    def copy(self) -> Dual:
        """Copy the values; derivatives are never changed in place."""
        return Dual(self.value.copy(), self.derivative)

    def clip(self, low: Any = None, high: Any = None) -> Dual:
        """As ``np.clip``."""
        clipped = self if low is None else np.maximum(self, low)
        return clipped if high is None else np.minimum(clipped, high)

    def __array_ufunc__(self, f: np.ufunc, method: str, *inputs: Any, **how: Any) -> Any:
        into = how.pop("out", None)
        if method != "__call__" or "where" in how:
            raise NotDifferentiable(f"numpy.{f.__name__} with where=, or its method {method!r}")
        values = [_parts(x)[0] for x in inputs]
        if f in FLAT:
            result: Any = f(*values, **how)
            return result if into is None else _stored(into, Dual(result, 0.0))
        if f not in PARTIALS:
            raise NotDifferentiable(f"the function {f.__name__!r}")
        value = f(*values, **how)
        terms = [
            partial(value, *values) * x.derivative
            for partial, x in zip(PARTIALS[f], inputs, strict=True)
            if isinstance(x, Dual)
        ]
        derivative = np.asarray(sum(terms)).astype(value.dtype, copy=False)
        result = Dual(value, derivative)
        return result if into is None else _stored(into, result)

    def __array_function__(self, f: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if f not in _FUNCTIONS:
            raise NotDifferentiable(f"numpy.{f.__name__}")
        return _FUNCTIONS[f](*args, **kwargs)


def _parts(x: Any) -> tuple[Any, Any]:
    return (x.value, x.derivative) if isinstance(x, Dual) else (x, 0.0)


def _stored(into: tuple[Any, ...], result: Dual) -> Dual:
    """Write a result over another, as ``x += y`` does."""
    (target,) = into
    if not isinstance(target, Dual):
        raise NotDifferentiable("an array of its own that it stores scores in")
    target[...] = result
    return target


def _where(condition: Any, x: Any, y: Any) -> Dual:
    condition = _parts(condition)[0]
    (x, dx), (y, dy) = _parts(x), _parts(y)
    value = np.where(condition, x, y)
    return Dual(value, np.where(condition, dx, dy).astype(value.dtype, copy=False))


def _constant(f: Callable[..., Any]) -> Callable[..., Dual]:
    return lambda x, *rest, **how: Dual(f(_parts(x)[0], *rest, **how), 0.0)


_FUNCTIONS: Mapping[Any, Callable[..., Any]] = {
    np.where: _where,
    np.clip: lambda x, low=None, high=None: x.clip(low, high),
    np.copy: lambda x: x.copy(),
    np.broadcast_to: lambda x, shape: Dual(
        np.broadcast_to(x.value, shape), np.broadcast_to(x.derivative, shape)
    ),
    **{f: _constant(f) for f in (np.zeros_like, np.ones_like, np.full_like, np.empty_like)},
    **{f: lambda x, f=f: f(x.value) for f in (np.shape, np.ndim, np.size)},
}
