"""What torch.compile makes of attention(): an operator of its graph. torch is not needed for that.

Its compiler, dynamo, takes for a function that has the attribute ``_torchdynamo_inline`` what that
holds, and looks into it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def let_compile(attention: Callable[..., Any]) -> None:
    """Have torch.compile look into ``attention_in_graph`` instead of this function."""
    attention.__dict__["_torchdynamo_inline"] = attention_in_graph


def attention_in_graph(q: Any, k: Any, v: Any, **arguments: Any) -> Any:
    """``attention``, for tensors and what a graph can hold; anything else breaks the graph."""
    from flashcore_cupy.integrations import torch_attention  # torch is there, for it compiles

    return torch_attention.in_graph(q, k, v, arguments)
