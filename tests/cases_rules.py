"""A call with each rule: arguments of ``describe_rules``, by their names in ``spills_with``."""

from __future__ import annotations

from typing import Any

import numpy as np

from flashcore_cupy.problem.array_spec import spec_of
from flashcore_cupy.problem.listed_blocks import LISTS, Lists


def array(dtype: str, *shape: int) -> Any:
    """An array that is only looked at."""
    return spec_of(np.empty(shape, dtype))


_LISTS = Lists(
    {name: array("i4", 1, 1, 1, *[1] * (n % 2)) for n, name in enumerate(LISTS)}, (64, 64), (64, 64)
)
#: Of one head, or broadcast to all.
ASKED: dict[str, dict[str, Any]] = {
    "softcap": {"softcap": 30.0},
    "softcap_wide": {"softcap": 1e4},
    "alibi": {"alibi_slopes": array("f4", 1)},
    "bias": {"bias": array("f2", 64, 64)},
    "bias_fp32": {"bias": array("f4", 64, 64)},
    "score_mod": {"score_mod": "score * 2"},
    "mask": {"mask": array("?", 64, 64)},
    "mask_mod": {"mask_mod": "kv_idx != 3"},
    "blocks": {"block_mask": _LISTS, "mask_mod": "kv_idx != 3"},
    "sink": {"sink": array("f4", 1)},
    "dropout": {"dropout_p": 0.1},
}
