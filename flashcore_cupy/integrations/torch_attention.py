"""attention() for torch: operators of torch's library, and their gradients.

Who records operators (torch.compile, torch.export, a dispatch mode) finds ``flashcore::attention``
and ``flashcore::attention_backward`` in what it has recorded, with an implementation for the CPU
and for CUDA, and one without values. Where nothing is recorded, an ``autograd.Function`` does
without them.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from flashcore_cupy.integrations import engine
from flashcore_cupy.integrations.engine import Options
from flashcore_cupy.problem import interop
from flashcore_cupy.problem.mod_elements import label
from flashcore_cupy.problem.request import ARGUMENTS
from flashcore_cupy.problem.stream import entered
from flashcore_cupy.problem.tracing import leave_dynamo, untraced

_LIBRARY = torch.library.Library("flashcore", "DEF")
# Arrays by their names, parted by spaces; q, k and v come first. Options are JSON.
_SCHEMAS = (
    "attention(Tensor[] arrays, str names, str options) -> (Tensor o, Tensor lse)",
    "attention_backward(Tensor[] arrays, str names, str options, str wrt) -> Tensor[]",
)
# Results are not in the memory that torch.compile gives to a graph which it captures by itself.
_TAGS = [torch.Tag.cudagraph_unsafe] if hasattr(torch.Tag, "cudagraph_unsafe") else []
for _schema in _SCHEMAS:
    _LIBRARY.define(_schema, tags=_TAGS)
_NAMES = frozenset(ARGUMENTS) - {"q", "k", "v", "out", "stream", "gate"} | {"deterministic"}
#: What of a call's arguments a graph can hold.
_HELD = (bool, int, float, str, tuple, list, dict, type(None))
_CAST = (torch.float32, torch.float16, torch.bfloat16)

leave_dynamo()  # torch.compile may be what has this imported


def attend(q: Any, k: Any, v: Any, arguments: Mapping[str, Any]) -> Any:
    """``attention`` of tensors of which some require a gradient, or are traced.

    ``arguments``: those that are given; and deterministic, for the gradients.
    """
    if not isinstance(q, torch.Tensor):
        raise TypeError(
            f"q: got {type(q).__name__} beside tensors of torch that require a gradient or are "
            f"traced; use a torch.Tensor"
        )
    in_kernel = q.is_cuda or arguments.get("kernel", "auto") != "auto"
    arrays, options = engine.split(arguments, in_kernel=in_kernel)
    return_lse = options.pop("return_lse", False)
    named = {"q": q, "k": k, "v": v} | arrays
    named = {name: _tensor(name, x, q.device) for name, x in named.items()}
    _check(named, options)
    for name in "qkv":
        named[name] = _autocast(named[name])
    names, tensors = " ".join(named), list(named.values())
    if torch.compiler.is_compiling():
        o, lse = _in_graph(names, options, tensors)
    elif _is_recorded(tensors):
        o, lse = RecordedAttention.apply(names, _text(options), *tensors)
    else:
        o, lse = Attention.apply(names, engine.plain(options), *tensors)
    return (o, lse) if return_lse else o


def _in_graph(names: str, options: dict[str, Any], tensors: list[Any]) -> Any:
    """What torch.compile puts into its graph."""
    text = _text({name: _settled(x) for name, x in options.items()})
    tensors = [x.view_as(x) if _has(tensors[:n], x) else x for n, x in enumerate(tensors)]
    if _differentiates(tensors):
        return RecordedAttention.apply(names, text, *tensors)
    return torch.ops.flashcore.attention(tensors, names, text)


def eager_attend() -> Callable[..., Any]:
    """``attend``, run as it is: torch.compile, where that is in use, would look into each call."""
    return _not_compiled() if "torch._dynamo" in sys.modules else attend


@functools.cache
def _not_compiled() -> Callable[..., Any]:
    disabled: Callable[..., Any] = torch.compiler.disable(attend)
    return disabled


def in_graph(q: Any, k: Any, v: Any, arguments: dict[str, Any]) -> Any:
    """``attention``, as torch.compile sees it: an operator of its graph, or a break of that."""
    fits = isinstance(q, torch.Tensor) and all(name in _NAMES for name in arguments)
    for name, x in arguments.items():
        is_value = name not in engine.OTHERS and name != "mod_args"
        if callable(x) or not isinstance(x, _HELD if is_value else (*_HELD, torch.Tensor)):
            fits = False
    if not fits:
        return _as_it_is(q, k, v, arguments)
    return attend(q, k, v, arguments)


def _settled(x: Any) -> Any:
    """A number that torch.compile may take for a variable, as the constant of a graph."""
    from torch.fx.experimental.symbolic_shapes import guard_scalar

    if isinstance(x, tuple | list):
        return tuple(_settled(n) for n in x)
    return guard_scalar(x) if isinstance(x, int | float) else x


@untraced
def _as_it_is(q: Any, k: Any, v: Any, arguments: dict[str, Any]) -> Any:
    return engine.attention(q, k, v, **arguments)


class Attention(torch.autograd.Function):
    """The output and the log-sum-exp of arrays, by their names, where nothing records operators.

    It takes half of the time that ``RecordedAttention`` does.
    """

    @staticmethod
    def forward(ctx: Any, names: str, options: Options, *arrays: Any) -> Any:
        """Compute, and keep what the gradients take."""
        output = forward_of_tensors(arrays, names, options)
        _keep(ctx, names, options, arrays, output)
        return output

    @staticmethod
    def backward(ctx: Any, do: Any, dlse: Any) -> Any:
        """The gradients of what requires one."""
        return _gradients(ctx, do, dlse)


class RecordedAttention(torch.autograd.Function):
    """The same by the operators: for torch.compile, torch.func, torch.vmap and dispatch modes."""

    @staticmethod
    def forward(names: str, options: Options, *arrays: Any) -> Any:
        """Compute."""
        if isinstance(options, str):
            return torch.ops.flashcore.attention(list(arrays), names, options)
        return _forward(arrays, names, options)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep what the gradients take."""
        names, options, *arrays = inputs
        _keep(ctx, names, options, arrays, output)

    @staticmethod
    def backward(ctx: Any, do: Any, dlse: Any) -> Any:
        """The gradients of what requires one."""
        return _gradients(ctx, do, dlse)

    @staticmethod
    def vmap(info: Any, in_dims: Any, names: str, options: Options, *arrays: Any) -> Any:
        """Mapped axes come first."""
        mapped = _mapped(info.batch_size, in_dims[2:], arrays)
        return RecordedAttention.apply(names, options, *mapped), (0, 0)


def _keep(ctx: Any, names: str, options: Options, arrays: Any, output: Any) -> None:
    ctx.names, ctx.options = names, options
    ctx.save_for_backward(*arrays, *output)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, do: Any, dlse: Any) -> Any:
    """One for each argument of a forward function; None for what requires none."""
    found = gradients(ctx.names, ctx.options, ctx.saved_tensors, ctx.needs_input_grad[2:], do, dlse)
    return None, None, *found


def gradients(
    names: str, options: Options, saved: Any, wanted: Sequence[bool], do: Any, dlse: Any
) -> Any:
    """One for each of the arrays, by their names; None for what is not wanted.

    ``saved``: the arrays, o and lse.
    """
    *arrays, o, lse = saved
    wrt = " ".join(name for name, is_wanted in zip(names.split(), wanted, strict=True) if is_wanted)
    if do is None:
        do = torch.zeros_like(o)
    # Not +=, for dynamo has in `arrays` a tuple.
    arrays = [*arrays, o, lse, do] if dlse is None else [*arrays, o, lse, do, dlse]
    given = f"{names} o lse do" if dlse is None else f"{names} o lse do dlse"
    if torch.compiler.is_compiling():  # which has no second derivatives either
        results = torch.ops.flashcore.attention_backward(arrays, given, options, wrt)
    elif torch.is_grad_enabled() or _is_recorded(arrays):
        results = Gradients.apply(given, _text(options), wrt, *arrays)
    else:
        results = _backward_of_tensors(arrays, given, options, wrt)
    found = iter(results)
    return [next(found) if is_wanted else None for is_wanted in wanted]


class Gradients(torch.autograd.Function):
    """The gradients of ``wrt``, which have none themselves."""

    @staticmethod
    def forward(names: str, options: Options, wrt: str, *arrays: Any) -> Any:
        """Compute."""
        if isinstance(options, str):
            return tuple(torch.ops.flashcore.attention_backward(list(arrays), names, options, wrt))
        return tuple(_backward(arrays, names, options, wrt))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep nothing."""

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        """Refuse."""
        raise RuntimeError("attention() has no second derivative; detach its gradients")

    @staticmethod
    def vmap(info: Any, in_dims: Any, names: str, options: Options, wrt: str, *arrays: Any) -> Any:
        """Mapped axes come first."""
        mapped = _mapped(info.batch_size, in_dims[3:], arrays)
        found = Gradients.apply(names, options, wrt, *mapped)
        return found, (0,) * len(found)


def forward_of_tensors(tensors: Any, names: str, options: Options) -> Any:
    """As ``_forward``; on a GPU by ``attention`` itself, whose launch cache knows tensors."""
    if not tensors[0].is_cuda:
        return _forward(tensors, names, options)
    return engine.forward(options, dict(zip(names.split(), tensors, strict=True)))


def _backward_of_tensors(tensors: Any, names: str, options: Options, wrt: str) -> Any:
    """As ``_backward``; on a GPU by ``attention_backward`` itself."""
    if not tensors[0].is_cuda:
        return _backward(tensors, names, options, wrt)
    arrays = dict(zip(names.split(), tensors, strict=True))
    return engine.backward(options, tuple(wrt.split()), arrays)


def _forward(tensors: Any, names: str, options: Options) -> Any:
    with _entered(tensors[0]):
        return _returned(engine.forward(options, _taken(tensors, names)))


def _backward(tensors: Any, names: str, options: Options, wrt: str) -> Any:
    with _entered(tensors[0]):
        arrays = _taken(tensors, names)
        return list(_returned(engine.backward(options, tuple(wrt.split()), arrays)))


for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("attention", _forward, _key)
    _LIBRARY.impl("attention_backward", _backward, _key)


@torch.library.register_fake("flashcore::attention", lib=_LIBRARY)
def _(tensors: Any, names: str, options: str) -> Any:
    q, _, v, *_ = tensors
    o, lse = engine.output_shapes(q.shape, v.shape, names.split(), options)
    return q.new_empty(o), q.new_empty(lse, dtype=torch.float32)


@torch.library.register_fake("flashcore::attention_backward", lib=_LIBRARY)
def _(tensors: Any, names: str, options: str, wrt: str) -> Any:
    arrays = dict(zip(names.split(), tensors, strict=True))
    return [arrays[name].new_empty(arrays[name].shape) for name in wrt.split()]


def _entered(q: Any) -> Any:
    return entered(q.device.index, interop.stream_of(q)) if q.is_cuda else contextlib.nullcontext()


def _taken(tensors: Any, names: str) -> dict[str, Any]:
    """Arrays by their names. An operator's implementation gets tensors that are just memory."""
    return dict(zip(names.split(), map(interop.of_tensor, tensors), strict=True))


def _returned(arrays: Any) -> Any:
    return tuple(interop.returned(x, "torch") for x in arrays)


def _tensor(name: str, x: Any, device: Any) -> Any:
    """An argument as a tensor; numbers per head in float32."""
    if not isinstance(x, torch.Tensor):
        if isinstance(x, list | tuple):
            where = None if name.startswith("cu_seqlens") else device
            x = torch.tensor(x, device=where)
        else:
            x = interop.returned(interop.taken(name, x)[0], "torch")
    return x.to(torch.float32) if name in engine.PER_HEAD else x


def _autocast(x: Any) -> Any:
    """As torch's own attention has it, in the dtype of the region."""
    where = x.device.type
    if x.dtype in _CAST and torch.is_autocast_enabled(where):
        return x.to(torch.get_autocast_dtype(where))
    return x


def _has(tensors: list[Any], x: Any) -> bool:
    """Whether a tensor is one of these: torch.compile wants no argument twice."""
    return any(x is y for y in tensors)


def _differentiates(tensors: list[Any]) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _check(named: dict[str, Any], options: dict[str, Any]) -> None:
    """Raise ``ValueError`` for axes too many, and ``TypeError`` for a gradient that there is not.

    The operators would take the former for axes that are mapped over. All else they check.
    """
    axes = 3 if "cu_seqlens_q" in named else 4
    for name in "qkv":
        if named[name].dim() > axes:
            raise ValueError(
                f"{name}: got {named[name].dim()} dimensions, shape {tuple(named[name].shape)}; "
                f"attention takes {axes}"
            )
    for name, x in named.items():
        if not _differentiates([x]):
            continue
        _check_mod_arg(name, options.get("score_mod"))
        if not engine.has_gradient(name):
            raise TypeError(
                f"{label(name)}: requires a gradient, which attention() does not have; "
                f"pass {label(name)}.detach()"
            )


@torch.compiler.assume_constant_result
def _check_mod_arg(name: str, score_mod: Any) -> None:
    engine.check_mod_arg(name, "float32", score_mod)  # what requires a gradient is a float


def _is_recorded(tensors: Any) -> bool:
    """Whether a mode or a kind of tensor sees operators, or torch.func maps or differentiates."""
    if torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack():
        return True
    own = torch.Tensor.__torch_dispatch__
    return any(x.__class__.__torch_dispatch__ is not own for x in tensors)


@torch.compiler.assume_constant_result
def _text(options: Options) -> Options:
    """Options as text; as they are where that cannot be, as with a function."""
    if isinstance(options, str):
        return options
    options = engine.plain(options)
    try:
        return engine.encode(options)
    except TypeError:
        return options


def _mapped(size: int, dims: Any, arrays: Any) -> list[Any]:
    return [
        x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
        for x, dim in zip(arrays, dims, strict=True)
    ]
