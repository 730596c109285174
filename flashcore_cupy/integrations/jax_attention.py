"""attention() for JAX: calls of handlers in its programs, and their gradients."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.custom_derivatives import SymbolicZero

from flashcore_cupy.integrations import engine, jax_ffi
from flashcore_cupy.problem import interop
from flashcore_cupy.problem.attention_problem import check_dtype
from flashcore_cupy.problem.mod_elements import label
from flashcore_cupy.problem.request import Request

_FORWARD, _BACKWARD = "flashcore_attention", "flashcore_attention_backward"


def attend(q: Any, k: Any, v: Any, arguments: Mapping[str, Any]) -> Any:
    """``attention`` of arrays of which some are traced. ``arguments``: those that are given."""
    in_kernel = jax.default_backend() == "gpu" or arguments.get("kernel", "auto") != "auto"
    arrays, options = engine.split(arguments, in_kernel=in_kernel)
    return_lse = options.pop("return_lse", False)
    options = engine.plain(options)
    arrays = {"q": q, "k": k, "v": v} | arrays
    arrays = {name: _array(name, x) for name, x in arrays.items()}
    _check(arrays, options)
    text = engine.encode(options, keep_functions=True)
    o, lse = _attention(" ".join(arrays), text, _alike(tuple(arrays.values())))
    return (o, lse) if return_lse else o


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(names: str, options: str, arrays: tuple[Any, ...]) -> Any:
    shapes = engine.output_shapes(arrays[0].shape, arrays[2].shape, names.split(), options)
    results = list(zip(shapes, (arrays[0].dtype, np.float32), strict=True))
    return _called(_FORWARD, results, arrays, names=names, options=options)


def _with_residuals(names: str, options: str, arrays: tuple[Any, ...]) -> Any:
    """The results, and what the gradients take: who wants one is told by keys, for JAX's sake."""
    wanted = {name: None for name, x in zip(names.split(), arrays, strict=True) if x.perturbed}
    values = tuple(x.value for x in arrays)
    score_mod = engine.score_mod_of(options)
    for name, x in zip(names.split(), values, strict=True):
        if name not in wanted:
            continue
        engine.check_mod_arg(name, x.dtype.name, score_mod)
        if not engine.has_gradient(name):
            raise TypeError(
                f"{label(name)}: differentiated, but attention() has no gradient for it; "
                f"pass jax.lax.stop_gradient({label(name)})"
            )
    o, lse = _attention(names, options, values)
    return (o, lse), (values, o, lse, wanted)


def _gradients(names: str, options: str, residuals: Any, cotangents: Any) -> Any:
    arrays, o, lse, wanted = residuals
    do, dlse = cotangents
    if isinstance(do, SymbolicZero):
        do = jax.numpy.zeros(o.shape, o.dtype)
    beside = {"o": o, "lse": lse, "do": do}
    if not isinstance(dlse, SymbolicZero):
        beside["dlse"] = dlse
    own = dict(zip(names.split(), arrays, strict=True))
    found = _called(
        _BACKWARD,
        [(own[name].shape, own[name].dtype) for name in wanted],
        (*arrays, *beside.values()),
        names=" ".join((names, *beside)),
        options=options,
        wrt=" ".join(wanted),
    )
    found = dict(zip(wanted, found, strict=True))
    return (tuple(found.get(name) for name in own),)


_attention.defvjp(_with_residuals, _gradients, symbolic_zeros=True)


def _called(target: str, results: list[Any], arrays: tuple[Any, ...], **attributes: str) -> Any:
    """A call of a handler; ``results``: shapes and dtypes."""
    arrays = _alike(arrays)

    def like(x: Any) -> tuple[Any, ...]:
        """Results that JAX knows to vary along the axes of a mesh as the arrays do."""
        alike = (x.sum().astype(dtype) for _, dtype in results)
        return tuple(map(jax.numpy.broadcast_to, alike, (shape for shape, _ in results)))

    structs = jax.eval_shape(like, arrays[0])
    call = jax.ffi.ffi_call(target, structs, vmap_method="broadcast_all")
    return call(*arrays, **attributes)


def _alike(arrays: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arrays that vary along the same axes of a mesh, inside shard_map, as a call wants them."""
    every = frozenset[str]().union(*map(_axes, arrays))
    return tuple(
        jax.lax.pcast(x, tuple(lacks), to="varying") if (lacks := every - _axes(x)) else x
        for x in arrays
    )


def _axes(x: Any) -> Any:
    """The axes of a mesh along which an array varies, as versions of JAX tell it."""
    described = jax.typeof(x)
    axes = getattr(described, "manual_axis_type", described)
    return getattr(axes, "varying", getattr(axes, "vma", frozenset()))


def _forward(attributes: dict[str, str], arrays: list[Any], results: list[Any]) -> None:
    named = dict(zip(attributes["names"].split(), arrays, strict=True))
    _write(engine.forward(attributes["options"], named, out=results[0]), results)


def _backward(attributes: dict[str, str], arrays: list[Any], results: list[Any]) -> None:
    named = dict(zip(attributes["names"].split(), arrays, strict=True))
    wrt = tuple(attributes["wrt"].split())
    _write(engine.backward(attributes["options"], wrt, named, out=tuple(results)), results)


def _write(found: tuple[Any, ...], results: list[Any]) -> None:
    for x, result in zip(found, results, strict=True):
        if x is not result:
            result[...] = x


jax_ffi.register(_FORWARD, _forward)
jax_ffi.register(_BACKWARD, _backward)


def _array(name: str, x: Any) -> Any:
    """An argument as JAX has it; numbers per head in float32, boundaries in int32."""
    if not isinstance(x, jax.Array | list | tuple):
        x, _ = interop.taken(name, x)  # refuses what is no array
        if name == "rng" and x.dtype in (np.int64, np.uint64):  # JAX may have no 64 bits
            x = x.astype(np.uint64).view(np.uint32)
    x = jax.numpy.asarray(x)
    if name.startswith("cu_seqlens") and jax.numpy.issubdtype(x.dtype, np.integer):
        return x.astype(np.int32)
    return x.astype(np.float32) if name in engine.PER_HEAD else x


def _check(arrays: engine.Arrays, options: Mapping[str, Any]) -> None:
    """Raise what ``attention`` would, before anything is compiled: with arrays of no content."""
    for name in "qkv":
        check_dtype(name, arrays[name].dtype, "jax")
    given = {name: _stand_in(name, x, arrays) for name, x in arrays.items()}
    q, k, v = (given.pop(name) for name in "qkv")
    mods = (options.get("score_mod"), options.get("mask_mod"))
    in_kernel = any(isinstance(mod, str) for mod in mods) or None
    own = {name: x for name, x in options.items() if name != "deterministic"}
    request = Request.of(engine.joined(given, own))
    request.call(q, k, v, None, on_gpu=False, in_kernel=in_kernel)


def _stand_in(name: str, x: Any, arrays: engine.Arrays) -> Any:
    if name.startswith("cu_seqlens"):
        rows = arrays["q" if name == "cu_seqlens_q" else "k"].shape[0]
        return np.array([0, *[rows] * (x.shape[0] - 1)], x.dtype)
    if name.startswith("mod_args"):
        return np.empty(x.shape, x.dtype)
    return np.broadcast_to(np.zeros((), x.dtype), x.shape)
