"""What stdout and stderr can show: how wide a line may be, and which characters they have."""

from __future__ import annotations

import codecs
import os
import re
from typing import TextIO

#: Where output goes to a file, and nothing says how wide it may be.
PIPE_COLUMNS = 110
_PADDING = re.compile(" +(?=\n)")
_ERRORS = "flashcore_cupy.plain"
#: One character for one in tables, so that columns stay in line.
_PLAIN = dict(zip("·•µ×−–—─━│╸╺…°²³", "--ux-----|--~o23", strict=True)) | {
    "√": "sqrt ",
    "→": "->",
    "≤": "<=",
    "≥": ">=",
}


def columns_of(stream: TextIO, fewest: int) -> int | None:
    """How wide a line may be: as COLUMNS says, or 110. None on a terminal, which rich asks.

    ``fewest``: what the tables need, lest their figures are cut.
    """
    if stream.isatty():
        return None
    said = os.environ.get("COLUMNS", "")
    if re.fullmatch("[0-9]{1,5}", said) and int(said) > 0:
        return max(int(said), fewest)
    return PIPE_COLUMNS


class Output:
    """A stream that takes every character, and no blanks at the end of a line in a file.

    Characters that the stream's encoding lacks are written as plain ones. rich takes it for UTF-8,
    and so draws the same tables everywhere.
    """

    encoding = "utf-8"

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write ``text`` as far as the stream can show it."""
        if not self.isatty():
            text = _PADDING.sub("", text)
        self._stream.write(plain(text, self._stream.encoding or "utf-8"))
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        self._stream.flush()

    def isatty(self) -> bool:
        """Whether the stream is a terminal."""
        return self._stream.isatty()

    def fileno(self) -> int:
        """The stream's file descriptor."""
        return self._stream.fileno()


def plain(text: str, encoding: str) -> str:
    r"""The text in characters of ``encoding``: "u" for "µ", ``\xe9`` for a byte of no character."""
    return text.encode(encoding, _ERRORS).decode(encoding)


def _plain_ones(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(_PLAIN.get(c) or _escaped(c) for c in lacking), error.end


def _escaped(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # a byte of a path that is no text, as Python holds it
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("ascii", "backslashreplace").decode("ascii")


codecs.register_error(_ERRORS, _plain_ones)
