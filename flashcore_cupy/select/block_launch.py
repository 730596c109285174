"""The launch that makes a block mask from a rule, by itself, and the arrays that it writes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from flashcore_cupy.problem.listed_blocks import LISTS
from flashcore_cupy.select.block_lister import Asked, BlockLister, write
from flashcore_cupy.select.plan import Launch


def empty_lists(asked: Asked, empty: Callable[..., Any]) -> dict[str, Any]:
    """The arrays that are written, by their names in ``LISTS``."""
    shapes = asked.shapes
    return {name: empty(shapes[n % 2], np.dtype(np.int32)) for n, name in enumerate(LISTS)}


def launch_of(asked: Asked, addresses: Mapping[str, int], mod_args: Sequence[int]) -> Launch | None:
    """The launch; None if there is no block. ``addresses``: of the lists, and of "mask"."""
    config = BlockLister.asked(asked.mods, mask=asked.mask is not None)
    params = np.zeros((), config.params)
    mods = {f"mod_args[{n}]": address for n, address in enumerate(mod_args)}
    write(params, asked, {**addresses, **mods})
    grid = math.prod(asked.shapes[0])
    return Launch(0, config, config.entries[0], grid, params) if grid else None
