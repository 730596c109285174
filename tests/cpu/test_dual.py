"""Dual numbers: each function that they know against central differences, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from flashcore_cupy.problem.dual import FLAT, PARTIALS, Dual, NotDifferentiable

STEP = 1e-6
#: Where a function is smooth, if that is not around -1.9, -0.5, 0.3 and 1.7.
DOMAINS: dict[np.ufunc, tuple[float, ...]] = {
    **{f: (0.2, 0.9, 1.1, 2.5) for f in (np.sqrt, np.log, np.log2, np.log10)},
    **{f: (-0.8, -0.2, 0.3, 0.9) for f in (np.arcsin, np.arccos, np.arctanh)},
    **{f: (0.2, 0.9, 1.3, 2.5) for f in (np.power, np.float_power)},
    np.log1p: (-0.5, 0.2, 1.0, 3.0),
    np.arccosh: (1.1, 1.5, 2.0, 3.0),
}
USUAL = (-1.9, -0.5, 0.3, 1.7)


def slope(f: Callable[..., Any], x: np.ndarray) -> np.ndarray:
    """Central differences."""
    return np.asarray((f(x + STEP) - f(x - STEP)) / (2 * STEP))


@pytest.mark.parametrize("f", PARTIALS, ids=lambda f: f.__name__)
def test_each_function(f: np.ufunc) -> None:
    """By its first argument, by its second, and by both, which the score is in."""
    x = np.array(DOMAINS.get(f, USUAL))
    seed = np.array([1.0, -2.0, 0.5, 3.0])  # the chain rule
    if f.nin == 1:
        forms: list[Callable[..., Any]] = [f]
    else:
        other = np.array([0.7, 1.9, 1.4, 2.2])
        forms = [lambda s: f(s, other), lambda s: f(other, s), lambda s: f(s, 1.1 * s * s)]
    for form in forms:
        got = form(Dual(x, seed))
        assert got.value.tobytes() == np.asarray(form(x)).tobytes()
        np.testing.assert_allclose(got.derivative, seed * slope(form, x), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("f", sorted(FLAT, key=str), ids=lambda f: f.__name__)
def test_steps_are_values_alone(f: np.ufunc) -> None:
    x = np.array(USUAL)
    got = f(Dual(x, 1.0), *[x[::-1]] * (f.nin - 1))
    np.testing.assert_array_equal(got, f(x, *[x[::-1]] * (f.nin - 1)))
    assert not isinstance(got, Dual)


FORMULAS: dict[str, Callable[[Any], Any]] = {
    "operators": lambda s: -s * 2 + s / 3 - 1 / (2 + s**2) + abs(s) % 0.9,
    "powers": lambda s: s**3 + 2.0**s + (1 + s * s) ** s,
    "where": lambda s: np.where(s > 0, np.sqrt(np.abs(s)), s * s),
    "where of one side": lambda s: np.where(s > 0, 5.0, s) + np.where(s > 0, s * s, 0),
    "clip": lambda s: np.clip(s, -1, 0.5) + s.clip(0.0, None) + np.clip(s, None, 1),
    "maximum": lambda s: np.maximum(s, 0) + np.minimum(s, s * s),
    "in place": lambda s: _in_place(s),
    "parts": lambda s: _parts(s),
    "casts": lambda s: s.astype(np.float64) * s.astype(np.int64) + s.astype(np.bool_),
    "steps": lambda s: np.floor(s) * s + np.sign(s) + (s > 0) * s,
    "like": lambda s: np.zeros_like(s) + np.ones_like(s) * s + np.full_like(s, 2) * s,
    "shapes": lambda s: s * np.size(s) + len(s) * s + s * s.shape[0] + np.ndim(s) * s.ndim,
    "broadcast": lambda s: np.broadcast_to(s, s.shape) * np.arange(1.0, 5.0),
    "constant": lambda s: np.full_like(s, 3.0) + s.size,
}


def _in_place(s: Any) -> Any:
    t = s.copy()
    t += 1
    t *= s
    t -= np.tanh(t)
    t /= 3
    np.floor(s, out=(u := s.copy()))
    return t + u


def _parts(s: Any) -> Any:
    t = s.copy()
    t[t < 0] = 0.5
    t[1:3] = s[1:3] ** 2
    return t + s[::-1]


@pytest.mark.parametrize("name", FORMULAS)
def test_formulas(name: str) -> None:
    x = np.array(USUAL)
    formula = FORMULAS[name]
    given = Dual(x.copy(), 1.0)
    got = formula(given)
    plain = formula(x.copy())
    np.testing.assert_array_equal(got.value, plain)
    # Of a vector: the diagonal and what parts() takes from elsewhere, in the direction of ones.
    np.testing.assert_allclose(got.derivative, slope(formula, x), rtol=1e-6, atol=1e-8)
    assert (given.derivative == 1).all()


def test_values_keep_their_dtype() -> None:
    x = np.array(USUAL, np.float32)
    got = np.exp(Dual(x, 1.0)) * 2 + 1
    assert got.value.dtype == got.derivative.dtype == np.float32
    assert got.value.tobytes() == (np.exp(x) * 2 + 1).tobytes()


def test_kinks_have_the_slope_of_a_side_or_none() -> None:
    zero = Dual(np.zeros(1), 1.0)
    assert np.abs(zero).derivative == 0
    assert np.maximum(zero, 0).derivative == np.minimum(zero, 0).derivative == 1
    assert np.where(zero > 0, zero, 0).derivative == 0
    assert (zero**0).derivative == 0 and (zero**1).derivative == 1 and (zero**2).derivative == 0
    assert (2**zero).derivative == np.log(2)


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a sum": (lambda s: s / np.sum(s), "numpy.sum"),
    "a method": (lambda s: s - s.mean(), "the method 'mean'"),
    "a reduction": (lambda s: np.add.reduce(s), "its method 'reduce'"),
    "where=": (lambda s: np.exp(s, where=s > 0), "numpy.exp with where="),
    "no derivative": (lambda s: np.spacing(s), "the function 'spacing'"),
    "a plain array": (lambda s: np.asarray(s) * 2, "a plain array that it makes of the scores"),
    "a number": (lambda s: float(s[0]), "a plain array"),
    "an array of its own": (lambda s: _stores(s), "an array of its own that it stores scores in"),
}


def _stores(s: Any) -> Any:
    t = np.zeros(4)
    t += s
    return t


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_derivative_is_named(name: str) -> None:
    formula, message = REFUSED[name]
    with pytest.raises(TypeError) as caught:
        formula(Dual(np.array(USUAL), 1.0))
    if name != "a number":  # which Python refuses itself
        assert isinstance(caught.value, NotDifferentiable) and message in str(caught.value)
    assert not hasattr(Dual(np.zeros(1), 1.0), "__array_interface__")
