"""Which calls have come once: a launch cache keeps those that come again."""

from __future__ import annotations

from typing import Any

_LIMIT = 4096  # calls; beyond, all are forgotten
_seen: set[int] = set()


def comes_again(key: Any) -> bool:
    """Whether a call, by its key, has come before; from here on it has."""
    code = hash(key)
    if code in _seen:
        return True
    if len(_seen) >= _LIMIT:
        _seen.clear()
    _seen.add(code)
    return False
