"""The version's one place: packaging and the cache key read it from here."""

from __future__ import annotations

__version__ = "0.1.0"
