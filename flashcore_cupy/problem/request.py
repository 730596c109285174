"""One call's arguments, from the caller's arrays to a problem and the arrays that it reads."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from flashcore_cupy.problem import interop, varlen
from flashcore_cupy.problem.array_spec import (
    ArraySpec,
    check_elements,
    check_out,
    check_overlaps,
    spec_of,
    spec_of_copy,
    usable,
    why_copied,
)
from flashcore_cupy.problem.attention_problem import (
    GATES,
    AttentionProblem,
    Causal,
    Gate,
    Layout,
    check_choice,
    check_dimensions,
    describe,
)
from flashcore_cupy.problem.block_mask import BlockMask
from flashcore_cupy.problem.listed_blocks import Lists
from flashcore_cupy.problem.mods import check_mod_args, check_mods
from flashcore_cupy.problem.rng import check_rng, integer_key, missing_rng
from flashcore_cupy.problem.rule_arrays import few_numbers, rule_array
from flashcore_cupy.problem.rules import RULES, Rules, describe_rules
from flashcore_cupy.problem.values import check_flag


@dataclass(frozen=True)
class Call:
    """A request, checked and described. A plan for a GPU and the CPU path start from it alike."""

    problem: AttentionProblem
    arrays: Mapping[str, Any]
    """By argument, CuPy's or NumPy's: q, k, v, out if it is given, those of the rules, and the
    boundaries of packed sequences."""
    mod_args: Mapping[str, Any]
    formulas: Mapping[str, Any]
    """On the CPU: score_mod and mask_mod."""
    rng: tuple[int, int] | None
    """Seed and offset, if they are not in an array of ``arrays``."""
    kernel: str
    config: Mapping[str, object] | None
    lists: Lists | None = None
    """Of the block mask."""

    @property
    def rng_key(self) -> int:
        """What kernels take of ``rng``; 0 where they read it from an array."""
        return integer_key(self.rng)

    @property
    def copied(self) -> dict[str, str]:
        """Which of q, k, v cannot be addressed as they are, and why."""
        why = {name: why_copied(self.arrays[name]) for name in "qkv"}
        return {name: reason for name, reason in why.items() if reason}

    def pointers(self, xp: Any, boundaries: Callable[[Any], Any]) -> dict[str, Any]:
        """The arrays of rules and of packed batches, by their names in ``AttentionParams``.

        ``boundaries`` brings cu_seqlens to where the kernel runs.
        """
        arrays = self.arrays
        found = {
            rule.pointer: usable(arrays[rule.name], xp)
            if rule.strides is None
            else arrays[rule.name]
            for rule in RULES
            if rule.pointer is not None and rule.name in arrays
        }
        if self.lists is not None:
            found |= self.lists.arrays
        if "rng" in arrays:
            found["rng"] = arrays["rng"]
        for name, argument in (("cu_seqlens_q", "cu_seqlens_q"), ("cu_seqlens_kv", "cu_seqlens_k")):
            if argument in arrays:
                found[name] = boundaries(arrays[argument])
        return found


@dataclass(frozen=True)
class Request:
    """``attention``'s arguments besides q, k, v, out, return_lse and stream."""

    layout: Layout = "bhsd"
    softmax_scale: float | None = None
    causal: Causal = False
    rules: Mapping[str, Any] = field(default_factory=dict)
    """Those of ``RULES`` that are given, and mod_args."""
    cu_seqlens_q: Any = None
    cu_seqlens_k: Any = None
    rng: Any = None
    batch_invariant: bool = False
    kernel: str = "auto"
    config: Mapping[str, object] | None = None
    gate: Gate | None = None

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Request:
        """Take arguments by their names."""
        rules = {name: x for name, x in arguments.items() if name in _RULE_ARGUMENTS}
        return cls(**{n: x for n, x in arguments.items() if n not in rules}, rules=rules)

    def call(
        self, q: Any, k: Any, v: Any, out: Any, *, on_gpu: bool, in_kernel: bool | None = None
    ) -> Call:
        """Check and describe a call on CuPy arrays, or on NumPy ones.

        For a GPU: with q's device current. ``in_kernel``: a kernel does it, which takes mods as
        expressions; by default that is so on a GPU, and where a kernel is named. Raises
        ``TypeError`` or ``ValueError`` naming the argument, what it got and what works.
        """
        if in_kernel is None:
            in_kernel = on_gpu or self.kernel != "auto"
        request, lists = self._plain()._listed(on_gpu, in_kernel)
        mod_args, arrays = request._rule_arrays(on_gpu)
        for name, x in (("q", q), ("k", k), ("v", v)):
            check_elements(name, x)
        if in_kernel and not on_gpu:
            request._check_for_kernel({"q": q, "k": k, "v": v, **arrays}, mod_args)
        sequences = request._boundaries(q, k, v, on_gpu)
        count = None if sequences is None else len(sequences[0]) - 1
        problem = request._problem(q, k, v, count)
        described = request._describe_rules(problem, arrays, mod_args, in_kernel)
        problem = replace(problem, rules=described)
        given = {"q": q, "k": k, "v": v, **arrays}
        if sequences is not None:
            given |= zip(("cu_seqlens_q", "cu_seqlens_k"), sequences, strict=True)
        rng = check_rng(self.rng, on_gpu=on_gpu)
        if described.dropout_p and rng is None:
            raise missing_rng(described.dropout_p)
        if not isinstance(rng, tuple):
            if described.dropout_p:
                given["rng"] = rng
            rng = None
        if out is not None:
            check_out(problem, out, {name: given[name] for name in "qkv"})
            named = {f"mod_args[{name!r}]": x for name, x in mod_args.items()}
            check_overlaps("out", out, arrays | named)
            given["out"] = out
        formulas = {name: request.rules.get(name) for name in _FORMULAS if not in_kernel}
        formulas = {name: x for name, x in formulas.items() if x is not None}
        return Call(problem, given, mod_args, formulas, rng, self.kernel, self.config, lists)

    def _listed(self, on_gpu: bool, in_kernel: bool) -> tuple[Request, Lists | None]:
        """The same with a block mask's lists in its place, and with the rule that it brings."""
        if self.rules.get("block_mask") is None:
            return self, None
        block_mask = BlockMask.of(self.rules["block_mask"])
        lists = block_mask.lists(cpu=not on_gpu)
        rules = block_mask.beside(self.rules, in_kernel=in_kernel) | {"block_mask": lists}
        return replace(self, rules=rules), lists

    def _plain(self) -> Request:
        """The same with plain flags and numbers."""
        changes: dict[str, Any] = {}
        for name in ("causal", "batch_invariant"):
            flag = getattr(self, name)
            changes[name] = bool(flag) if isinstance(flag, np.bool_) else flag
        scale = interop.plain_number("softmax_scale", self.softmax_scale)
        numbers = {
            rule.name: interop.plain_number(rule.name, self.rules[rule.name])
            for rule in RULES
            if rule.takes == "value" and rule.name in self.rules
        }
        return replace(self, softmax_scale=scale, rules={**self.rules, **numbers}, **changes)

    def _rule_arrays(self, on_gpu: bool) -> tuple[dict[str, Any], dict[str, Any]]:
        """The mods' arrays and the rules', as CuPy, or on the CPU NumPy, has them."""
        cpu = not on_gpu
        given = self.rules.get("mod_args")
        given = {} if given is None else given
        check_mod_args(given, *(self.rules.get(name) for name in _FORMULAS))
        mod_args = {name: rule_array(f"mod_args[{name!r}]", x, cpu) for name, x in given.items()}
        take = {"array": rule_array, "numbers per head": few_numbers}
        arrays = {
            rule.name: take[rule.takes](rule.name, self.rules.get(rule.name), cpu)
            for rule in RULES
            if rule.takes in take
        }
        return mod_args, {name: x for name, x in arrays.items() if x is not None}

    def _check_for_kernel(self, arrays: Mapping[str, Any], mod_args: Mapping[str, Any]) -> None:
        """Raise ``TypeError`` for what NumPy takes, but no kernel, even on NumPy arrays."""
        for name in _FORMULAS:
            if callable(self.rules.get(name)):
                raise TypeError(
                    f"{name}: got a Python function, and kernel={self.kernel!r} takes a CUDA "
                    f"expression as a string; leave kernel out to have the function called"
                )
        named = {f"mod_args[{name!r}]": x for name, x in mod_args.items()}
        for name, x in (*arrays.items(), *named.items()):
            if not x.dtype.isnative:
                raise TypeError(
                    f"{name}: got dtype {x.dtype.str}, which is not in this machine's byte order, "
                    f"as kernel={self.kernel!r} takes it"
                )

    def _problem(self, q: Any, k: Any, v: Any, sequences: int | None) -> AttentionProblem:
        """The problem, but for its rules."""
        specs = [spec_of_copy(x) if why_copied(x) else spec_of(x) for x in (q, k, v)]
        others = (self.softmax_scale, self.causal, self.gate, self.layout, sequences,
                  self.batch_invariant)  # fmt: skip
        return _problem_of(*specs, *(_Exact.of(x) for x in others))

    def _describe_rules(
        self,
        problem: AttentionProblem,
        arrays: Mapping[str, Any],
        mod_args: Mapping[str, Any],
        in_kernel: bool,
    ) -> Rules:
        rules = {n: x for n, x in self.rules.items() if n not in (*arrays, "mod_args")}
        rules |= {name: spec_of(x) for name, x in arrays.items()}
        if in_kernel:
            rules["mod_args"] = {name: spec_of(x) for name, x in mod_args.items()}
        else:  # for NumPy mods are callables
            check_mods(rules.pop("score_mod", None), rules.pop("mask_mod", None), mod_args)
        return describe_rules(problem.scores, problem.dtype, packed=problem.packed, **rules)

    def _boundaries(self, q: Any, k: Any, v: Any, on_gpu: bool) -> tuple[Any, Any] | None:
        if self.cu_seqlens_q is None and self.cu_seqlens_k is None:
            return None
        for name, x in (("q", q), ("k", k), ("v", v)):
            check_dimensions(name, x, self.layout, packed=True)
        sequences = varlen.boundaries(self.cu_seqlens_q, self.cu_seqlens_k, len(q), len(k))
        for name, x in zip(("cu_seqlens_q", "cu_seqlens_k"), sequences or (), strict=False):
            if not on_gpu and not isinstance(x, np.ndarray):
                raise TypeError(f"{name}: a CuPy array while q is a NumPy array; use NumPy's")
        return sequences


_FORMULAS = tuple(rule.name for rule in RULES if rule.takes == "formula")
_RULE_ARGUMENTS = (*(rule.name for rule in RULES), "mod_args")
#: All that attention() takes by name.
ARGUMENTS = (
    *("q", "k", "v"),
    *(field.name for field in fields(Request) if field.name != "rules"),
    *_RULE_ARGUMENTS,
    *("return_lse", "out", "stream"),
)


def check_results(gate: Any, return_lse: Any, out: Any) -> bool:
    """Check what a call is to return; whether the log-sum-exp is part of it."""
    want_lse = check_flag("return_lse", return_lse)
    check_choice("gate", gate, GATES)
    if gate in ("qk", "softmax") and (want_lse or out is not None):
        name = "return_lse" if want_lse else "out"
        raise ValueError(f"{name}: gate {gate!r} stops before the output; leave one of them out")
    return want_lse


@dataclass(frozen=True)
class _Exact:
    """An argument as a part of a key: True and 1 are not the same argument."""

    kind: type
    value: Any

    @classmethod
    def of(cls, value: Any) -> _Exact:
        return cls(type(value), value)


def _problem_of(*key: Any) -> AttentionProblem:
    try:
        return _cached_problem(*key)
    except TypeError as error:
        if "unhashable" not in str(error):
            raise
        return _cached_problem.__wrapped__(*key)  # which says what is wrong with the argument


@functools.lru_cache(maxsize=4096)
def _cached_problem(q: ArraySpec, k: ArraySpec, v: ArraySpec, *rules: _Exact) -> AttentionProblem:
    softmax_scale, causal, gate, layout, sequences, batch_invariant = (x.value for x in rules)
    return describe(
        *(q, k, v),
        softmax_scale=softmax_scale,
        causal=causal,
        gate=gate,
        layout=layout,
        sequences=sequences,
        batch_invariant=batch_invariant,
        addresses=(q.address, k.address, v.address),
    )
