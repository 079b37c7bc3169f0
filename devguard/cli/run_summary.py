"""``devguard run --summary``: run the program as a child, and then print what strayed, in the text of ``devguard log``.

Without ``--log`` the logs go to a private folder that is removed afterwards. With it, the summary is of the logs that
this run has written. Standard output and the exit status are those of the program.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from devguard import modes
from devguard.cli import program, supervisor
from devguard.cli.supervisor import End
from devguard.errors import ConfigError
from devguard.support.log_folder import TEMPORARY, VARIABLE
from devguard.support.signal_names import name_signal
from devguard.support.terminal import complain

if TYPE_CHECKING:
    from devguard.logs.reader import Process

__all__ = ["run"]

NOTHING_GUARDED = (
    "nothing was recorded: no process of the program has imported torch, or none could write its log on this machine."
)


def run(path: str, command: list[str], environment: Mapping[str, str]) -> int:
    """Run a program, print what strayed on standard error, and return the exit status of the program.

    Parameters
    ----------
    path : str
        The file to execute.
    command : list of str
        The name of the program and its arguments.
    environment : mapping of str to str
        Its environment, with devguard's variables.
    """
    # Held back until the folder is removed, so that Ctrl-C ends the program and leaves nothing behind.
    with supervisor.signals_held() as held, _log_folder(environment) as (folder, is_kept):
        earlier = _names(folder)
        try:
            end = supervisor.run(path, command, {**environment, VARIABLE: str(folder)}, held)
        except OSError as error:
            return program.report_failure("run", path, error)
        lines = ["the guard was off (mode off), so nothing was recorded."]
        if not modes.is_killed(environment):
            lines = _describe(folder, earlier, end, is_kept=is_kept)
    complain("devguard: " + "\n".join(lines))
    return end.status


@contextlib.contextmanager
def _log_folder(environment: Mapping[str, str]) -> Iterator[tuple[Path, bool]]:
    """Yield the folder of the logs, and whether it is kept: the one that the user named, or a temporary one."""
    named = environment.get(VARIABLE, "").strip()
    if named:
        yield Path(named), True
        return
    made = tempfile.mkdtemp(prefix=TEMPORARY)  # for this user alone
    try:
        yield Path(made), False
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _names(folder: Path) -> set[str]:
    with contextlib.suppress(OSError):  # not made yet
        return set(os.listdir(folder))
    return set()


def _describe(folder: Path, earlier: set[str], end: End, *, is_kept: bool) -> list[str]:
    """Return the summary of the logs in a folder, without the `earlier` ones."""
    try:
        return list(_summarize(folder, earlier, end, is_kept=is_kept))
    except ConfigError as error:
        return [str(error) if _names(folder) - earlier else NOTHING_GUARDED]
    except Exception as error:  # noqa: BLE001 - the exit status must be that of the program
        return [f"there is no summary: {type(error).__name__}: {error}"]


def _summarize(folder: Path, earlier: set[str], end: End, *, is_kept: bool) -> Iterator[str]:
    from devguard.logs import reader as log_reader
    from devguard.logs.summary import Summary, count
    from devguard.logs.text import format_text

    processes, sites, damaged = log_reader.read(folder, lambda process: process.file not in earlier)
    processes = [process for process in processes if process.file not in earlier]
    damaged = [place for place in damaged if place.partition(":")[0] not in earlier]
    _tell_end(processes, end)
    found = Summary(processes, sites, damaged, os.curdir)
    if not processes and not damaged:
        yield NOTHING_GUARDED
        return
    first, *others = format_text(found)
    number = count(len(processes), "process", "processes")
    others_shown = f" ({found.count_others()})" if found.others else ""
    yield first if found.strays else f"nothing strayed in {number}{others_shown}."
    if found.strays or found.alerts or found.died or damaged:
        yield from others
    running = sum(process.end == "running" for process in processes)
    if running and not is_kept:
        yield f"Still running: {running} of {number}. devguard run --log DIR keeps their logs."


def _tell_end(processes: list[Process], end: End) -> None:
    """Tell how the program ended, which its own log cannot say and no guarded parent has seen."""
    from devguard.logs import process_end
    from devguard.logs import reader as log_reader
    from devguard.support import process_identity

    signal_name = name_signal(-end.code) if end.code < 0 else None
    child = process_end.ChildEnd(end.pid, signal_name, max(end.code, 0) or None, time.time())
    parent = log_reader.Process("", os.getpid(), socket.gethostname(), pid_space=process_identity.pid_space())
    parent.children.append(child)
    process_end.settle([*processes, parent])
