"""The edges of ``attention`` with every kernel."""

from cases_edges import *  # noqa: F403
