"""Whether this process is one of several that can each own a GPU, without a launcher that says so.

Such a process is a child of `multiprocessing`, or was forked by a parent that still lives, as a worker of a web server
is. A daemon is forked too, but its parent ends, so it is one program like any other.
"""

from __future__ import annotations

import os
import sys
from typing import Any

__all__ = ["has_siblings", "is_child", "watch_forks"]


class _Forks:
    """The last fork that led to this process.

    Attributes
    ----------
    watched : bool
        Whether forks are watched.
    forking : int
        The process that is about to fork; 0 if none is.
    parent : int
        The process that forked this one; 0 if it was not forked since `watch_forks`.
    """

    def __init__(self) -> None:
        self.watched = False
        self.forking = 0
        self.parent = 0

    def before(self) -> None:
        self.forking = os.getpid()

    def after_in_child(self) -> None:
        # A server in C (uWSGI) forks without the call before. The parent's parent may be set already.
        self.parent, self.forking = self.forking or os.getppid(), 0


_forks = _Forks()


def watch_forks() -> None:
    """Remember from now on, in each forked process, which process forked it. Python cannot undo this."""
    if not _forks.watched:
        _forks.watched = True
        os.register_at_fork(before=_forks.before, after_in_child=_forks.after_in_child)


def is_child() -> bool:
    """Return whether this process is a `multiprocessing` child, also while the child is still being prepared."""
    processes: Any = sys.modules.get("multiprocessing.process")
    return processes is not None and (
        processes.parent_process() is not None or getattr(processes.current_process(), "_inheriting", False)
    )


def has_siblings() -> bool:
    """Return whether this process can have siblings: a `multiprocessing` child, or forked by a living parent."""
    return is_child() or (_forks.parent != 0 and os.getppid() == _forks.parent)
