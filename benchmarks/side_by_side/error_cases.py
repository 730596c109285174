"""What the error table covers: everything that torch's function can express of attention."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import ml_dtypes
import numpy as np

from flashcore_cupy.cpu import reference
from flashcore_cupy.cpu.reference import InputKind

Array = np.ndarray[Any, Any]

_DTYPES = ("float16", "bfloat16", "float32")
_HALF = _DTYPES[:2]
_HARD: tuple[InputKind, ...] = ("outliers", "large")
_SHORT = dict(zip(_DTYPES, ("fp16", "bf16", "fp32"), strict=True))


@dataclass(frozen=True)
class Case:
    """One problem of (B, H, S, D) arrays."""

    dtype: str
    head_dim: int
    seqlen_q: int = 512
    seqlen_kv: int = 512
    heads: int = 4
    heads_kv: int = 4
    batch: int = 2
    causal: bool = False
    """Aligned top-left, as torch's."""
    mask: bool = False
    bias: bool = False
    scale: float | None = None
    kind: InputKind = "normal"

    @property
    def name(self) -> str:
        """Sizes, then what is not plain."""
        words = [_SHORT[self.dtype], f"D{self.head_dim}", f"S{self.seqlen_q}"]
        if self.seqlen_kv != self.seqlen_q:
            words[-1] += f"x{self.seqlen_kv}"
        if self.heads_kv != self.heads:
            words.append(f"H{self.heads}/{self.heads_kv}")
        words += [word for word in ("causal", "mask", "bias") if getattr(self, word)]
        if self.scale is not None:
            words.append(f"scale={self.scale:g}")
        if self.kind != "normal":
            words.append(self.kind)
        return " ".join(words)

    @property
    def element(self) -> np.dtype[Any]:
        """The dtype as NumPy's."""
        return np.dtype(ml_dtypes.bfloat16 if self.dtype == "bfloat16" else self.dtype)

    def arrays(self) -> tuple[Array, Array, Array]:
        """Q (B, H, Sq, D), k and v (B, Hkv, Skv, D), the same every time."""
        return reference.make_inputs(
            self.kind,
            batch=self.batch,
            heads=self.heads,
            heads_kv=self.heads_kv,
            seqlen=self.seqlen_q,
            seqlen_kv=self.seqlen_kv,
            head_dim=self.head_dim,
            dtype=self.dtype,
            seed=1,
        )

    def operands(self) -> dict[str, Any]:
        """Arrays (B, H, Sq, Skv) by argument: "mask", boolean, or "bias", of q's dtype.

        Every query sees at least one key.
        """
        rng = np.random.default_rng(2)
        shape = (self.batch, self.heads, self.seqlen_q, self.seqlen_kv)
        found: dict[str, Any] = {}
        if self.mask:
            found["mask"] = rng.random(shape) < 0.5
            found["mask"][..., 0] = True
        if self.bias:
            found["bias"] = rng.standard_normal(shape, dtype=np.float32).astype(self.element)
        return found

    @property
    def rules(self) -> dict[str, Any]:
        """What ``attention`` and the oracle take beside arrays."""
        return {
            "causal": "top-left" if self.causal else False,
            "softmax_scale": 1 / math.sqrt(self.head_dim) if self.scale is None else self.scale,
        }

    def to_json(self) -> dict[str, Any]:
        """Return the name and the fields."""
        return {"name": self.name, **asdict(self)}


def cases() -> list[Case]:
    """All cases."""
    return [
        *_dims(),
        *_tails(),
        *_rules(),
        *(
            Case(dtype, dim, kind=kind, causal=causal)
            for kind, dtype, (dim, causal) in product(_HARD, _DTYPES, ((64, False), (128, True)))
        ),
    ]


def _dims() -> Iterator[Case]:
    for dtype, dim, causal in product(_DTYPES, (32, 64, 96, 128, 192, 256), (False, True)):
        yield Case(dtype, dim, causal=causal)


def _tails() -> Iterator[Case]:
    """Lengths that no tile divides, one query, more keys than queries and fewer."""
    sizes = ((1, 1000), (77, 333), (513, 513), (1000, 777))
    for dtype, (seqlen_q, seqlen_kv) in product(_DTYPES, sizes):
        yield Case(dtype, 64, seqlen_q, seqlen_kv)
    for dtype in _DTYPES:
        yield Case(dtype, 128, 513, 513, causal=True)
        yield Case(dtype, 64, 300, 500, causal=True)
    for dtype in _HALF:
        yield Case(dtype, 128, 1024, 1024, causal=True)


def _rules() -> Iterator[Case]:
    for dtype, dim in product(_DTYPES, (64, 128)):
        yield Case(dtype, dim, mask=True)
        yield Case(dtype, dim, bias=True)
    for dtype, causal in product(_DTYPES, (False, True)):
        yield Case(dtype, 128, heads=8, heads_kv=2, causal=causal)
    for dtype, scale in product(_DTYPES, (0.02, 0.5)):
        yield Case(dtype, 64, scale=scale)
