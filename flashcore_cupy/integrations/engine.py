"""What torch's operators and JAX's handlers compute, on NumPy or CuPy arrays.

Both hand over arrays by their names and the other arguments as text, for that is what their graphs
can hold. Where something is mapped over, all arrays have the mapped axes in front.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from flashcore_cupy.problem import interop
from flashcore_cupy.problem.block_mask import BlockMask
from flashcore_cupy.problem.gradients import INPUTS, Gradients, by_result
from flashcore_cupy.problem.mod_elements import MOD_ARGS, check_differentiated
from flashcore_cupy.problem.rules import RULES
from flashcore_cupy.select.backward_table import BACKWARD_KERNELS

Arrays = dict[str, Any]
Shape = tuple[int, ...]
Options = str | Mapping[str, Any]
"""What a call has besides arrays, by name; as text where a graph is to hold it."""

#: Numbers per head, which are taken as float32, and all that may be arrays besides q, k, v.
PER_HEAD = tuple(rule.name for rule in RULES if rule.takes == "numbers per head")
OTHERS = (
    *(rule.name for rule in RULES if rule.takes in ("array", "numbers per head")),
    *("cu_seqlens_q", "cu_seqlens_k", "rng"),
)
#: What neither a gradient nor a trace can have.
_REFUSED = {
    "out": "it is written in place, which has no gradient; leave it out, use the result",
    "stream": "work is ordered by who differentiates or traces; leave it out",
    "gate": "what a gate returns has no gradient; leave it out",
}
#: How many axes an array has, a batch's before them, where these are not four.
_AXES = {name: 2 for name in PER_HEAD} | {"lse": 3, "dlse": 3}

_BLOCK_MASK = "block_mask."  # before the names of its lists

_functions: dict[str, Callable[..., Any]] = {}
_kept_functions: list[Callable[..., Any]] = []


def connect(attention: Callable[..., Any], attention_backward: Callable[..., Gradients]) -> None:
    """Say which functions compute, which are of the layer above."""
    _functions.update(attention=attention, attention_backward=attention_backward)


def split(arguments: Mapping[str, Any], *, in_kernel: bool) -> tuple[Arrays, dict[str, Any]]:
    """A call's arguments besides q, k and v: those that may be arrays, and the others.

    ``in_kernel``: mods are expressions. Raises ``ValueError`` for what means nothing here,
    ``TypeError`` for mod_args without names.
    """
    given = {name: x for name, x in arguments.items() if x is not None}
    for name, why in _REFUSED.items():
        if name in given:
            raise ValueError(f"{name}: {why}")
    lists: Arrays = {}
    if "block_mask" in given:
        mask = BlockMask.of(given["block_mask"])
        lists = {f"{_BLOCK_MASK}{name}": x for name, x in mask.arrays.items()}
        given = mask.beside(given, in_kernel=in_kernel) | {"block_mask": (mask.seqlens, mask.block)}
    arrays = {name: given.pop(name) for name in OTHERS if name in given}
    if isinstance(arrays.get("rng"), tuple | list):  # two integers
        given["rng"] = arrays.pop("rng")
    mod_args = given.pop("mod_args", {})
    if not isinstance(mod_args, Mapping):
        raise TypeError(f"mod_args: got {type(mod_args).__name__}; use a dict of names and arrays")
    arrays |= {f"{MOD_ARGS}{name}": x for name, x in mod_args.items()}
    return arrays | lists, given


def has_gradient(name: str) -> bool:
    """Whether an array has one; of mod_args, ``check_mod_arg`` tells."""
    return name in INPUTS or name.startswith(MOD_ARGS)


def check_mod_arg(name: str, dtype: str, score_mod: Any) -> None:
    """Raise for an array of mod_args that has no gradient; all else passes."""
    if name.startswith(MOD_ARGS):
        check_differentiated(name, dtype, score_mod)


def score_mod_of(options: Options) -> Any:
    """That of a call, or None."""
    return _decoded(options).get("score_mod")


def plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with numbers for arrays of one; ``TypeError`` for one that has a gradient."""
    return {name: interop.plain_number(name, x) for name, x in options.items()}


def encode(options: Mapping[str, Any], *, keep_functions: bool = False) -> str:
    """Options as text; ``TypeError`` if one cannot be written.

    Functions can where they are kept, as long as the process lives.
    """
    functions = {name: x for name, x in options.items() if callable(x) and keep_functions}
    kept = {name: {"function": _kept(x)} for name, x in functions.items()}
    return json.dumps({**options, **kept}, default=_plain)


def _kept(function: Any) -> int:
    """The number of a function."""
    if function not in _kept_functions:
        _kept_functions.append(function)
    return _kept_functions.index(function)


def attention(*args: Any, **arguments: Any) -> Any:
    """The function itself."""
    return _functions["attention"](*args, **arguments)


def output_shapes(q: Shape, v: Shape, names: Iterable[str], options: Options) -> list[Shape]:
    """The shapes of the output and of the log-sum-exp."""
    rows = q[:-1]
    if "cu_seqlens_q" in names or _decoded(options).get("layout") == "bshd":
        rows = (*q[:-3], q[-2], q[-3])
    return [(*q[:-1], v[-1]), rows]


def forward(options: Options, arrays: Arrays, out: Any = None) -> tuple[Any, Any]:
    """The output, in ``out`` if that is given and nothing is mapped over, and the log-sum-exp."""
    given = _decoded(options)
    given.pop("deterministic", None)

    def call(arrays: Arrays, out: Any = None) -> tuple[Any, Any]:
        o, lse = _functions["attention"](**joined(arrays, given), return_lse=True, out=out)
        return o, lse

    if not (axes := _mapped_axes(arrays)):
        return call(arrays, out)
    shapes = output_shapes(arrays["q"].shape, arrays["v"].shape, arrays, options)
    o, lse = _mapped(call, arrays, axes, shapes, given)
    return o, lse


def backward(
    options: Options, wrt: tuple[str, ...], arrays: Arrays, out: Any = None
) -> tuple[Any, ...]:
    """The gradients of ``wrt``, in ``out`` if that is given and nothing is mapped over."""
    given = _decoded(options)
    # The names of kernels are the forward's, and so are the fields of their rows.
    kernel, _ = given.pop("kernel", "auto"), given.pop("config", None)
    if kernel != "auto" and isinstance(arrays["q"], np.ndarray):
        *_, given["kernel"] = BACKWARD_KERNELS  # emulated as well, by the one for all problems

    def call(arrays: Arrays, out: Any = None) -> tuple[Any, ...]:
        found = _functions["attention_backward"](**joined(arrays, given), wrt=wrt, out=out)
        gradients = by_result(found)
        return tuple(gradients[f"d{name}"] for name in wrt)

    if not (axes := _mapped_axes(arrays)):
        return call(arrays, out)
    return _mapped(call, arrays, axes, [arrays[name].shape for name in wrt], given)


def _mapped_axes(arrays: Arrays) -> int:
    return max(0, int(arrays["q"].ndim) - (3 if "cu_seqlens_q" in arrays else 4))


def _mapped(
    call: Callable[[Arrays], tuple[Any, ...]],
    arrays: Arrays,
    axes: int,
    shapes: list[Shape],
    options: Mapping[str, Any],
) -> tuple[Any, ...]:
    """A call over the leading axes: they become a part of the batch; or one after the other."""
    sizes = arrays["q"].shape[:axes]
    count = math.prod(sizes)
    flat = {name: x.reshape(count, *x.shape[axes:]) for name, x in arrays.items()}
    folded = _folded(flat, options)
    if folded is not None:
        results = call(folded)
    else:
        each = [call({name: x[n] for name, x in flat.items()}) for n in range(count)]
        xp = np if isinstance(arrays["q"], np.ndarray) else _cupy()
        results = tuple(xp.stack(x) for x in zip(*each, strict=True))
    return tuple(x.reshape(shape) for x, shape in zip(results, shapes, strict=True))


def _folded(flat: Arrays, options: Mapping[str, Any]) -> Arrays | None:
    """Arrays (N, B, ...) as (N * B, ...); None where that would be another problem.

    As for rules that know a batch by its number, and for arrays that all of a batch share.
    """
    if {"sink", "cu_seqlens_q", "rng"} & flat.keys():
        return None
    if {"score_mod", "mask_mod", "block_mask"} & options.keys() or options.get("dropout_p"):
        return None
    folded = {}
    batch = flat["q"].shape[1]
    for name, x in flat.items():
        count, *shape = x.shape
        shape = [*(1,) * (_AXES.get(name, 4) - len(shape)), *shape]
        if shape[0] != batch:
            return None
        folded[name] = x.reshape(count * batch, *shape[1:])
    return folded


def joined(arrays: Arrays, options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that ``split`` has parted."""
    found = {**options}
    for prefix, name in ((MOD_ARGS, "mod_args"), (_BLOCK_MASK, "block_mask")):
        own = {n.removeprefix(prefix): x for n, x in arrays.items() if n.startswith(prefix)}
        arrays = {n: x for n, x in arrays.items() if not n.startswith(prefix)}
        if own and prefix == MOD_ARGS:
            found[name] = own
        elif own:
            seqlens, block = options[name]
            found[name] = BlockMask(own, tuple(seqlens), tuple(block))
    return found | arrays


def _decoded(options: Options) -> dict[str, Any]:
    return dict(_read(options) if isinstance(options, str) else options)


@functools.lru_cache(maxsize=4096)
def _read(text: str) -> dict[str, Any]:
    options: dict[str, Any] = json.loads(text)
    for name, x in options.items():
        if isinstance(x, dict) and "function" in x:
            options[name] = _kept_functions[x["function"]]
    return options | ({"window": tuple(options["window"])} if "window" in options else {})


def _plain(x: Any) -> Any:
    """NumPy's numbers and truths as Python's."""
    if isinstance(x, np.generic):
        return x.item()
    raise TypeError(f"{type(x).__name__} cannot be written as text")


def _cupy() -> Any:
    import cupy

    return cupy
