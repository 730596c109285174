"""The gradients of attention by ours, torch and FlashAttention-4: the backward pass alone.

A run returns (dq, dk, dv), as q, k and v lie. Each starts from its own output and log-sum-exp.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Iterator
from typing import Any

from flashcore_cupy import attention, attention_backward
from flashcore_cupy.backward import plan_backward
from side_by_side.backends import Backend, FlashAttention4, Inputs, OnTorch, Ours, Run, as_cupy
from side_by_side.cells import Cell
from side_by_side.results import CUDNN, FA4, FA4_FIXED, FLASH2, FLASH2_FIXED, OURS, OURS_ANY


class OurGradients(Ours):
    """``attention_backward``, by a plan that is built ahead."""

    def __init__(self, torch: Any, kernel: str = "auto", *, deterministic: bool = True) -> None:
        super().__init__(torch, kernel)
        self.name = OURS if deterministic else OURS_ANY
        self._deterministic = deterministic

    def bind(self, cell: Cell, inputs: Inputs) -> Run:
        """Build the plan, its gradients tensors' memory."""
        operands, rules = self._call(cell, inputs)
        results = tuple(
            self._torch.full_like(x, float("nan")) for x in (inputs.q, inputs.k, inputs.v)
        )
        out = tuple(as_cupy(self._torch, x) for x in results)
        bound = plan_backward(*operands, out=out, **rules)
        self._note = f"{bound.selection.name}: {bound.selection.describe()}"

        def run() -> Any:
            bound.launch()
            return results

        return run

    def public_call(self, cell: Cell, inputs: Inputs) -> Run:
        """``attention_backward(...)``, every check of its arguments included."""
        operands, rules = self._call(cell, inputs)
        return functools.partial(attention_backward, *operands, **rules)

    def _call(self, cell: Cell, inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """do, q, k, v, o, lse as CuPy arrays, and the other arguments."""
        q, k, v = (as_cupy(self._torch, x) for x in (inputs.q, inputs.k, inputs.v))
        rules = self._rules(cell, inputs)
        forward = {name: x for name, x in rules.items() if name != "kernel"}
        o, lse = attention(q, k, v, return_lse=True, **forward)
        operands = as_cupy(self._torch, inputs.do), q, k, v, o, lse
        return operands, rules | {"deterministic": self._deterministic}


class TorchGradients(OnTorch):
    """The operators behind ``scaled_dot_product_attention`` and ``varlen_attn``, by one library."""

    def __init__(self, torch: Any, name: str) -> None:
        super().__init__(torch, name)
        self._is_fixed = name == FLASH2_FIXED
        self._library = "cudnn" if name == CUDNN else "flash"

    def takes(self, cell: Cell) -> bool:
        """Every cell."""
        return True

    def bind(self, cell: Cell, inputs: Inputs) -> Run:
        """Run the forward pass; what is left is one operator."""
        with self.selected():
            return self._packed(cell, inputs) if cell.lengths else self._dense(cell, inputs)

    def public_call(self, cell: Cell, inputs: Inputs) -> Run:
        """The same operator."""
        return self.bind(cell, inputs)

    @contextlib.contextmanager
    def selected(self) -> Iterator[None]:
        """Have torch repeat its bits, where that is what is measured; without filling memory."""
        if not self._is_fixed:
            yield
            return
        torch = self._torch
        filling: Any = importlib.import_module("torch.utils.deterministic")
        before = torch.are_deterministic_algorithms_enabled(), filling.fill_uninitialized_memory
        torch.use_deterministic_algorithms(True)
        filling.fill_uninitialized_memory = False
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0])
            filling.fill_uninitialized_memory = before[1]

    def _dense(self, cell: Cell, inputs: Inputs) -> Run:
        """By heads-first views of the memory that the others read."""
        aten = self._torch.ops.aten
        forward = getattr(aten, f"_scaled_dot_product_{self._library}_attention")
        backward = getattr(aten, f"_scaled_dot_product_{self._library}_attention_backward")
        q, k, v = inputs.heads_first
        with_lse = (None, True) if self._library == "cudnn" else ()
        found = forward(q, k, v, *with_lse, 0.0, cell.causal)
        o, lse, starts_q, starts_k, longest_q, longest_k, seed, offset, _ = found
        at = starts_q, starts_k, longest_q, longest_k, 0.0, cell.causal
        own = (seed, offset, None, *at) if self._library == "cudnn" else (*at, seed, offset)
        run = functools.partial(backward, inputs.do.transpose(1, 2), q, k, v, o, lse, *own)
        return lambda: tuple(x.transpose(1, 2) for x in run())

    def _packed(self, cell: Cell, inputs: Inputs) -> Run:
        aten, longest, starts = self._torch.ops.aten, max(cell.lengths), inputs.cu_seqlens
        forward = getattr(aten, f"_{self._library}_attention_forward")
        backward = getattr(aten, f"_{self._library}_attention_backward")
        q, k, v = inputs.q, inputs.k, inputs.v
        at = starts, starts, longest, longest
        if self._library == "cudnn":
            found = forward(q, k, v, None, *at, True, 0.0, cell.causal, False)
            o, lse, seed, offset = found[0], found[1], found[6], found[7]
            own: tuple[Any, ...] = (seed, offset, None, *at, 0.0, cell.causal)
        else:
            o, lse, seed, offset, _ = forward(q, k, v, *at, 0.0, cell.causal, False)
            own = *at, 0.0, cell.causal, seed, offset
        return functools.partial(backward, inputs.do, q, k, v, o, lse, *own)


class FlashAttention4Gradients(FlashAttention4):
    """FlashAttention-4's backward kernels, its semaphores included where it repeats its bits."""

    def __init__(self, torch: Any, *, deterministic: bool = False) -> None:
        super().__init__(torch)
        self.name = FA4_FIXED if deterministic else FA4
        self._deterministic = deterministic

    def bind(self, cell: Cell, inputs: Inputs) -> Run:
        """Run the forward pass. Raises ``RuntimeError`` without the package."""
        if self._module is None:
            raise RuntimeError(self._missing)
        inner = importlib.import_module("flash_attn.cute.interface")
        rules: dict[str, Any] = {"causal": cell.causal}
        for side in "qk" if cell.lengths else "":
            rules[f"cu_seqlens_{side}"] = inputs.cu_seqlens
            rules[f"max_seqlen_{side}"] = max(cell.lengths)
        q, k, v = inputs.q, inputs.k, inputs.v
        o, lse = inner._flash_attn_fwd(q, k, v, return_lse=True, **rules)[:2]
        rules["deterministic"] = self._deterministic
        return functools.partial(inner._flash_attn_bwd, q, k, v, o, inputs.do, lse, **rules)

    def public_call(self, cell: Cell, inputs: Inputs) -> Run:
        """The same call."""
        return self.bind(cell, inputs)


def compared(torch: Any, kernel: str) -> list[Backend]:
    """All, in the order of ``results.NAMES``; ``kernel``: ours by this one."""
    ours = [OurGradients(torch, kernel, deterministic=fixed) for fixed in (True, False)]
    torchs = {name: TorchGradients(torch, name) for name in (FLASH2, CUDNN, FLASH2_FIXED)}
    fa4, fa4_fixed = (FlashAttention4Gradients(torch, deterministic=x) for x in (False, True))
    free = torchs[FLASH2], torchs[CUDNN], fa4
    return [*ours, *free, torchs[FLASH2_FIXED], fa4_fixed]
