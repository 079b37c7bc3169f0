"""Locks that survive a fork.

A fork copies each lock as it is. A lock that another thread held is never released in the child, because the child has
no such thread. So every lock of devguard is made here: in the child it is free again. Where the data under a lock may
not be copied half-changed, a fork also waits for the lock, `WAIT_S` at most.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any

__all__ = ["after", "after_in_child", "before", "new_condition", "new_lock", "opening"]

WAIT_S = 2.0  # longer than any lock is held, unless the lock waits for the thread that forks

_locks: weakref.WeakSet[Any] = weakref.WeakSet()
_awaited: list[Any] = []
_taken: dict[int, list[Any]] = {}  # thread -> the locks that its fork acquires


def new_lock(*, awaited: bool = False) -> Any:
    """Return a reentrant lock that is free in a forked child, unless the thread that forked holds it.

    Parameters
    ----------
    awaited : bool
        Whether a fork waits until no other thread holds the lock. For locks of modules: it is never forgotten.
    """
    lock = threading.RLock()  # reentrant, because a finalizer or a signal handler may need it inside
    _locks.add(lock)
    if awaited:
        _awaited.append(lock)
    return lock


def new_condition() -> threading.Condition:
    """Return a condition. Its lock is free in a forked child, where no thread waits for it."""
    return threading.Condition(new_lock())


# An interrupt (Ctrl-C) may end each hook at any step, and Python then forks all the same. So a lock is noted before it
# is acquired, and released only if this thread owns it; and the hooks after a fork, which may be repeated, run twice.


def before() -> None:
    """Wait for the awaited locks; a second call before the same fork does nothing."""
    if threading.get_ident() in _taken:
        return
    taken = _taken[threading.get_ident()] = []
    for lock in _awaited:
        if not lock._is_owned():  # otherwise the program holds it during the fork, and releases it
            taken.append(lock)
            lock.acquire(timeout=WAIT_S)


def after() -> None:
    """Release what `before` took."""
    taken = _taken.get(threading.get_ident(), [])
    while taken:
        if taken[-1]._is_owned():
            taken[-1].release()
        taken.pop()
    _taken.pop(threading.get_ident(), None)


def after_in_child() -> None:
    """Make the locks that other threads held free again."""
    for lock in _locks:
        renew = getattr(lock, "_at_fork_reinit", None)  # as Python's own modules do
        if renew is not None and not lock._is_owned():
            renew()
    after()
    _taken.clear()


# Held while doors open and close, which also imports their modules. Awaited: a child could not import a module that
# another thread was importing, and would open the doors a second time.
opening = new_lock(awaited=True)

os.register_at_fork(before=before)
for _ in range(2):
    os.register_at_fork(after_in_parent=after, after_in_child=after_in_child)
