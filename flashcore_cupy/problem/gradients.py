"""One call of ``attention_backward``, from the caller's arrays to a problem and its arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np

from flashcore_cupy.problem import interop
from flashcore_cupy.problem.array_spec import (
    check_overlaps,
    check_place,
    check_written,
    spec_of,
    spec_of_copy,
    why_copied,
)
from flashcore_cupy.problem.attention_problem import (
    AttentionProblem,
    Operand,
    check_choice,
    contiguous_operand,
    dtype_beside,
    operand,
)
from flashcore_cupy.problem.mod_elements import (
    MOD_ARGS,
    check_differentiated,
    label,
    mod_args_among,
)
from flashcore_cupy.problem.mods import check_score_mod_grad
from flashcore_cupy.problem.request import ARGUMENTS, Call, Request
from flashcore_cupy.problem.rule_arrays import rule_array
from flashcore_cupy.problem.rules import RULES
from flashcore_cupy.problem.values import check_flag, shown

#: What has a gradient: q, k, v and rules' arrays; and beside these "mod_args.table", by its name.
INPUTS = ("q", "k", "v", *(rule.name for rule in RULES if rule.has_gradient))
_OWN = ("do", "o", "lse", "dlse", "wrt", "deterministic", "accumulate", "score_mod_grad")
#: All that attention_backward() takes by name.
BACKWARD_ARGUMENTS = (*_OWN, *(name for name in ARGUMENTS if name != "return_lse"))
_DEFAULTS: Mapping[str, Any] = {
    "wrt": ("q", "k", "v"), "deterministic": True, "accumulate": False, "score_mod_grad": None,
    "out": None, "gate": None,
}  # fmt: skip
BackwardGate = Literal["dp", "ds"]
BACKWARD_GATES = (None, "dp", "ds")


class Gradients(NamedTuple):
    """The gradients of what ``attention_backward`` was asked for, each in its input's shape."""

    dq: Any = None
    dk: Any = None
    dv: Any = None
    dbias: Any = None
    dsink: Any = None
    dalibi_slopes: Any = None
    dmod_args: Any = None
    """A dict, by the names of mod_args."""


_OF_MOD_ARGS = f"d{MOD_ARGS}"


def gathered(found: Mapping[str, Any]) -> Gradients:
    """Gradients by their results' names, with "dmod_args.table" for an array of mod_args."""
    own = {name: x for name, x in found.items() if not name.startswith(_OF_MOD_ARGS)}
    mods = {n.removeprefix(_OF_MOD_ARGS): x for n, x in found.items() if n not in own}
    return Gradients(**own, dmod_args=mods or None)


def by_result(gradients: Gradients | Mapping[str, Any]) -> dict[str, Any]:
    """The other way round; without what is None."""
    own = gradients._asdict() if isinstance(gradients, Gradients) else dict(gradients)
    mods = own.pop("dmod_args", None)
    if mods is not None and not isinstance(mods, Mapping):
        raise TypeError(f"out.dmod_args: got {shown(mods)}; use a dict of names and arrays")
    own |= {f"{_OF_MOD_ARGS}{name}": x for name, x in (mods or {}).items()}
    return {name: x for name, x in own.items() if x is not None}


class Result(NamedTuple):
    """An array that is written."""

    name: str
    """As ``Gradients`` has it: "dq"; or "dmod_args.table"."""
    dtype: str
    operand: Operand | None
    """Of dq, dk and dv: the (B, H, S, D) view."""
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """Elements; 0 along an axis of length 1."""

    @property
    def of(self) -> str:
        """The input that it is the gradient of."""
        return self.name[1:]


@dataclass(frozen=True)
class BackwardProblem:
    """What is asked for; hashable, so that it can key a cache."""

    attention: AttentionProblem
    do: Operand
    o: Operand
    results: tuple[Result, ...]
    """In the order of ``wrt``."""
    has_dlse: bool
    deterministic: bool
    accumulate: bool
    """Results are added to; all are float32."""
    score_mod_grad: str | None
    """Of a kernel: the user's expression."""
    gate: BackwardGate | None = None
    """The stage that is wanted, as the pass of the first result computes it."""

    @property
    def mod_args(self) -> tuple[str, ...]:
        """The names of those of mod_args whose gradients are asked for."""
        return mod_args_among(result.of for result in self.results)

    @property
    def elements(self) -> tuple[tuple[str, str], ...]:
        """What a kernel's score_mod reads of them, as ``Mods.elements`` has it, array by array."""
        mods = self.attention.rules.mods
        return () if mods is None else mods.elements(self.mod_args)

    @property
    def flops(self) -> float:
        """Floating-point operations of the products, by the usual count: 2.5 x the forward's.

        So S, dP and each of dq, dk and dv count half of the forward's, be it computed once or more
        often. Not known of a packed batch.
        """
        products = 2 + sum(result.operand is not None for result in self.results)
        return self.attention.flops * products / 2


@dataclass(frozen=True)
class BackwardCall:
    """A request, checked and described. A plan for a GPU and the CPU path start from it alike."""

    problem: BackwardProblem
    forward: Call
    """The attention that is differentiated."""
    arrays: Mapping[str, Any]
    """``forward.arrays``, do, o, lse, dlse if there is one, and the results, by their names."""
    score_mod_grad: Any
    """On the CPU: the user's function."""

    @property
    def copied(self) -> dict[str, str]:
        """Which inputs cannot be addressed as they are, and why; lse and dlse: C-contiguous."""
        arrays = {
            name: self.arrays[name] for name in ("do", "o", "lse", "dlse") if name in self.arrays
        }
        why = {name: why_copied(x) for name, x in arrays.items()}
        for name in why.keys() & {"lse", "dlse"}:
            if spec_of(arrays[name]).strides != spec_of_copy(arrays[name]).strides:
                why[name] = "it is not C-contiguous"
        return self.forward.copied | {name: reason for name, reason in why.items() if reason}


@dataclass(frozen=True)
class BackwardRequest:
    """``attention_backward``'s arguments besides its arrays and stream."""

    attention: Request
    wrt: tuple[str, ...]
    deterministic: bool
    accumulate: bool
    score_mod_grad: Any
    out: Mapping[str, Any]
    """The caller's arrays, by their names in ``Gradients``."""
    gate: BackwardGate | None = None

    @classmethod
    def of(
        cls,
        attention: Request,
        *,
        wrt: Any,
        deterministic: Any,
        accumulate: Any,
        score_mod_grad: Any,
        out: Any,
        gate: Any = None,
    ) -> BackwardRequest:
        """Check what asks for no array."""
        names = _asked(wrt, attention)
        if gate is not None:
            names = _looked_at(gate, names, attention, out)
        deterministic = check_flag("deterministic", deterministic)
        accumulate = check_flag("accumulate", accumulate)
        given = _given(out, names)
        for name in names if accumulate else ():
            if f"d{name}" not in given:
                raise ValueError(
                    f"out: got no d{name}; accumulate=True adds to arrays that are given, one for "
                    f"each of wrt"
                )
        return cls(attention, names, deterministic, accumulate, score_mod_grad, given, gate)

    @classmethod
    def taken(cls, arguments: Mapping[str, Any]) -> BackwardRequest:
        """Take arguments by their names: all but the operands and the stream."""
        own = {name: x for name, x in arguments.items() if name in _DEFAULTS}
        rest = {name: x for name, x in arguments.items() if name not in own}
        return cls.of(Request.of(rest), **{**_DEFAULTS, **own})

    def call(
        self,
        operands: Mapping[str, Any],
        out: Mapping[str, Any],
        *,
        on_gpu: bool,
        empty: Callable[..., Any],
    ) -> BackwardCall:
        """Check and describe a call on CuPy arrays, or on NumPy ones.

        For a GPU: with q's device current. ``operands``: q, k, v as ``interop.taken_together`` has
        them, and do, o, lse and dlse, which may be None, as the caller has. ``out``: what of the
        results is given, as ``interop.taken_out`` has it; ``empty(shape, dtype)`` makes the others.
        Raises ``TypeError`` or ``ValueError`` naming the argument, what it got and what works.
        """
        q, k, v = (operands[name] for name in "qkv")
        forward = self.attention.call(q, k, v, None, on_gpu=on_gpu)
        in_kernel = on_gpu or forward.kernel != "auto"
        score_mod = self.attention.rules.get("score_mod")
        check_score_mod_grad(self.score_mod_grad, score_mod, forward.mod_args, in_kernel=in_kernel)
        problem = forward.problem
        arrays = {**forward.arrays, **_beside(problem, operands, q, cpu=not on_gpu)}
        arrays |= {f"{MOD_ARGS}{name}": x for name, x in forward.mod_args.items()}
        for name in self.wrt:
            if name.startswith(MOD_ARGS):
                check_differentiated(name, arrays[name].dtype.name, score_mod)
        inputs = {label(name): x for name, x in arrays.items()}
        results = {f"d{name}": self._result(name, arrays[name], out, inputs) for name in self.wrt}
        _check_apart({name: out[name] for name in results if name in out})
        made = {
            name: empty(arrays[name[1:]].shape, arrays[name[1:]].dtype) if x is None else x
            for name, x in results.items()
        }
        described = BackwardProblem(
            problem,
            do=_operand("do", arrays["do"], problem),
            o=_operand("o", arrays["o"], problem),
            results=tuple(_described(name, x, problem) for name, x in made.items()),
            has_dlse="dlse" in arrays,
            deterministic=self.deterministic,
            accumulate=self.accumulate,
            score_mod_grad=self.score_mod_grad if in_kernel else None,
            gate=self.gate,
        )
        grad = None if in_kernel else self.score_mod_grad
        return BackwardCall(described, forward, arrays | made, grad)

    def _result(
        self, name: str, like: Any, out: Mapping[str, Any], inputs: Mapping[str, Any]
    ) -> Any:
        """Check a result that is given; None if it is not."""
        x = out.get(f"d{name}")
        if x is None:
            return None
        target = f"out.d{name}"
        check_place(target, x, like.shape, inputs["q"])
        if x.dtype != np.float32 and (self.accumulate or x.dtype != like.dtype):
            got = x.dtype.name if x.dtype.isnative else x.dtype.str
            or_else = f"or {label(name)}'s, {like.dtype.name}"
            why = "which accumulate=True adds in" if self.accumulate else or_else
            raise TypeError(f"{target}: got dtype {got}; use float32, {why}")
        check_written(target, x, inputs, dense=name.startswith(MOD_ARGS))
        return x


def contiguous_gradients(
    attention: AttentionProblem,
    wrt: Sequence[str] = ("q", "k", "v"),
    gate: BackwardGate | None = None,
    *,
    deterministic: bool = True,
) -> BackwardProblem:
    """The gradients of q, k and v on C-contiguous arrays, without any: for compiling ahead."""
    check_choice("gate", gate, BACKWARD_GATES)
    dtype, layout = attention.dtype, attention.layout
    shape = (*attention.q.shape[:3], attention.head_dim_v)
    o = contiguous_operand("o", shape, dtype, layout)
    inputs = {"q": attention.q, "k": attention.k, "v": attention.v}
    asked = {f"d{name}": replace(inputs[name], name=f"d{name}") for name in wrt}
    results = (Result(name, dtype, x, x.shape, (*x.strides, 1)) for name, x in asked.items())
    return BackwardProblem(
        attention, do=replace(o, name="do"), o=o, results=tuple(results)[: 1 if gate else None],
        has_dlse=False, deterministic=deterministic, accumulate=False, score_mod_grad=None,
        gate=gate,
    )  # fmt: skip


def _asked(wrt: Any, attention: Request) -> tuple[str, ...]:
    """The names in ``wrt``: of some inputs that a call has."""
    choices = ", ".join([*map(repr, INPUTS), "'mod_args.' and a name"])
    mod_args = attention.rules.get("mod_args")
    mod_args = mod_args if isinstance(mod_args, Mapping) else {}
    if not isinstance(wrt, tuple | list) or not wrt:
        raise TypeError(f"wrt: got {shown(wrt)}; use a tuple of some of {choices}")
    for name in wrt:
        is_mod_arg = isinstance(name, str) and name.startswith(MOD_ARGS)
        if not isinstance(name, str) or (name not in INPUTS and not is_mod_arg):
            raise ValueError(f"wrt: got {shown(name)}; choose some of {choices}")
        rules = mod_args if is_mod_arg else attention.rules
        if name not in "qkv" and rules.get(name.removeprefix(MOD_ARGS)) is None:
            raise ValueError(f"wrt: asks for the gradient of {name}, which is not given")
    if len(set(wrt)) < len(wrt):
        raise ValueError(f"wrt: got {shown(wrt)}; name each input once")
    return tuple(wrt)


def _looked_at(gate: Any, wrt: tuple[str, ...], attention: Request, out: Any) -> tuple[str, ...]:
    """The input whose pass a gate stops in: the first of ``wrt``."""
    check_choice("gate", gate, BACKWARD_GATES)
    if attention.cu_seqlens_q is not None:
        raise ValueError(f"gate: got {gate!r} with cu_seqlens; stop at a stage without packing")
    if out is not None:
        raise ValueError(f"out: gate {gate!r} stops before the gradients; leave one of them out")
    if wrt[0] == "sink":
        raise ValueError(f"gate: the gradient of sink has no stage {gate!r}; begin wrt with 'q'")
    return wrt[:1]


def _given(out: Any, wrt: tuple[str, ...]) -> dict[str, Any]:
    """Arrays to be written, by their names in ``Gradients``."""
    names = [f"d{name}" for name in wrt]
    if out is None:
        return {}
    if isinstance(out, tuple | list) and not isinstance(out, Gradients):
        if len(out) != len(names):
            raise ValueError(f"out: got {len(out)} arrays; use one for each of wrt, {len(names)}")
        out = dict(zip(names, out, strict=True))
    elif not isinstance(out, Gradients | Mapping):
        raise TypeError(
            f"out: got {shown(out)}; use a mapping such as {{{names[0]!r}: ...}}, the Gradients of "
            f"a call, or a tuple with an array for each of wrt"
        )
    given = by_result(out)
    for name in given:
        if name not in names:
            raise ValueError(f"out: has {shown(name)}; wrt asks for {', '.join(names)}")
    return given


def _beside(
    problem: AttentionProblem, operands: Mapping[str, Any], q: Any, *, cpu: bool
) -> dict[str, Any]:
    """The arrays that a forward call has not: do, o, lse and dlse, where q is."""
    found = {}
    for name in ("do", "o", "lse", "dlse"):
        if operands[name] is None and name == "dlse":
            continue
        interop.gpu_of(name, operands[name])  # refuses None as well
        x = found[name] = rule_array(name, operands[name], cpu)
        wanted, what = problem.output_shape, "output's"
        if name in ("lse", "dlse"):
            wanted, what = problem.lse_shape, "log-sum-exp's"
        if tuple(x.shape) != wanted:
            raise ValueError(
                f"{name}: got shape {tuple(x.shape)}; this problem's {what} is {wanted}"
            )
        if what == "output's" and x.dtype != q.dtype:
            own, other = dtype_beside(x.dtype, q.dtype), dtype_beside(q.dtype, x.dtype)
            raise TypeError(f"{name}: got dtype {own}; q's is {other}")
        if what != "output's" and x.dtype != np.float32:
            raise TypeError(
                f"{name}: got dtype {dtype_beside(x.dtype, np.dtype('f4'))}; use float32"
            )
    return found


def _check_apart(results: Mapping[str, Any]) -> None:
    labelled = {f"out.{name}": x for name, x in results.items()}
    for name in list(labelled):
        x = labelled.pop(name)
        check_overlaps(name, x, labelled)


def _operand(name: str, x: Any, problem: AttentionProblem) -> Operand:
    spec = spec_of_copy(x) if why_copied(x) else spec_of(x)
    return operand(name, spec, "packed" if problem.packed else problem.layout, spec.address)


def _described(name: str, x: Any, problem: AttentionProblem) -> Result:
    own = _operand(name, x, problem) if name[1:] in ("q", "k", "v") else None
    strides = (0 if n == 1 else s // x.itemsize for n, s in zip(x.shape, x.strides, strict=True))
    return Result(name, x.dtype.name, own, tuple(x.shape), tuple(strides))
