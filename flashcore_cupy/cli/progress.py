"""What a command is doing, on stderr; and its end in order."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import click

from flashcore_cupy.cli import tables

#: Where stderr is no terminal: a line after this long, and then every so often. Seconds.
_FIRST_S = 2.0
_EVERY_S = 10.0


class Steps:
    """Phases of steps: a progress bar on a terminal, elsewhere a line now and then."""

    def __init__(self) -> None:
        console = tables.console(stderr=True)
        # Colours may be forced upon a file, a bar may not; and a dumb terminal cannot move it.
        moves = sys.stderr.isatty() and console.is_terminal and not console.is_dumb_terminal
        self._bar = tables.progress(console) if moves else None
        self._task: Any = None
        self._words, self._done, self._steps = "", 0, 0
        self._began = time.monotonic()
        self._over = threading.Event()
        self._teller = threading.Thread(target=self._tell, daemon=True)

    def __enter__(self) -> Steps:
        self._began = time.monotonic()
        if self._bar is not None:
            self._bar.start()
        else:
            self._teller.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        if self._bar is not None:
            self._bar.stop()

    def start(self, steps: int, words: str) -> None:
        """Begin a phase of so many steps."""
        self._words, self._done, self._steps = words, 0, steps
        if self._bar is not None:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(words, total=steps or None, last="")

    def phase(self, words: str) -> None:
        """Begin a phase of which nothing tells how far it is."""
        self.start(0, words)

    def step(self, words: str) -> None:
        """Count a step of the phase; ``words`` say which."""
        self._done += 1
        if self._bar is not None:
            self._bar.update(self._task, advance=1, last=words)

    def _tell(self) -> None:
        wait = _FIRST_S
        while not self._over.wait(wait):
            count = f": {self._done} of {self._steps}" if self._steps else ""
            seconds = time.monotonic() - self._began
            click.echo(f"{self._words}{count} ({seconds:.0f} s)", err=True)
            wait = _EVERY_S


class _Stopped(SystemExit):
    """A signal asked for the end."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.name = signal.Signals(number).name


@contextlib.contextmanager
def orderly_end() -> Iterator[None]:
    """Within it SIGTERM, or a hang-up, is an exception: workers end, and a bar is cleared away."""
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        numbers = []  # handlers are the main thread's to set
    numbers = [n for n in numbers if signal.getsignal(n) == signal.SIG_DFL]  # nohup's stays
    for number in numbers:
        signal.signal(number, _stop)
    try:
        yield
    except _Stopped as stopped:
        click.echo(f"stopped by {stopped.name}", err=True)
        raise
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def _stop(number: int, frame: object) -> None:
    raise _Stopped(number)
