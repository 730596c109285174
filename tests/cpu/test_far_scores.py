"""Scores of any size that float32 holds, on NumPy arrays."""

from cases_far_scores import *  # noqa: F403
