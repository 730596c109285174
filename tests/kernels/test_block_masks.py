"""Block masks with every kernel that walks over lists of tiles."""

from cases_block_masks import *  # noqa: F403
