"""Work on all cores: tasks that are independent of each other, in threads."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import TypeVar

_Task = TypeVar("_Task")


def cores() -> int:
    """How many cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def run(do: Callable[[_Task], None], tasks: Iterable[_Task]) -> None:
    """Do all tasks, in this thread and in as many more as there are cores, or can be started.

    No pool of threads: one refuses work in an exit handler, and in a thread that outlives the
    main one. Raises what the first task that failed raised.
    """
    left = deque(enumerate(tasks))
    failures: dict[int, BaseException] = {}

    def work() -> None:
        while left:
            try:
                number, task = left.popleft()
            except IndexError:  # another thread was faster
                return
            try:
                do(task)
            except BaseException as error:
                failures[number] = error
                left.clear()

    helpers: list[threading.Thread] = []
    try:
        # A system at its limits and an interpreter that shuts down start no more threads.
        with contextlib.suppress(RuntimeError):
            for _ in range(min(cores(), len(left)) - 1):
                helper = threading.Thread(target=work)
                helper.start()
                helpers.append(helper)
        work()
    finally:
        left.clear()  # for the helpers of a call that is interrupted
        for helper in helpers:
            helper.join()
    if failures:
        try:
            raise failures[min(failures)]
        finally:
            failures.clear()  # else the error, whose traceback has this frame, keeps all arrays
