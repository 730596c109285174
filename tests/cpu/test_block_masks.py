"""Block masks on NumPy arrays, and how they are made and checked."""

from cases_block_masks import *  # noqa: F403
