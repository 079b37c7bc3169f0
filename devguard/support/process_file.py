"""The file of this process in a log folder, written without torch or wrapt: for alerts also where the guard is off."""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

from devguard._version import __version__
from devguard.support import log_folder, process_identity
from devguard.support.append_file import AppendFile
from devguard.support.redaction import redact_command

__all__ = ["encode", "has_file", "open_in", "ProcessFile", "SUFFIX"]

SUFFIX = ".jsonl"


class ProcessFile(AppendFile):
    """A new file in a log folder, with a first line that names this process.

    Parameters
    ----------
    folder : Path
        The folder; created if it does not exist.

    Raises
    ------
    OSError
        If it cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        if folder.name.startswith(log_folder.TEMPORARY) and not folder.exists():
            raise FileNotFoundError(errno.ENOENT, "the command that made it has ended", str(folder))
        super().__init__(folder / f"{_begin_name(os.getpid())}{time.time_ns()}{SUFFIX}")
        self._alerts: set[str] = set()
        self.write(encode({"process": _describe()}))

    def write_alert(self, text: str) -> None:
        """Write a text of `notices.alert`, once."""
        if text not in self._alerts:
            self._alerts.add(text)
            self.write(encode({"alert": text, "time": time.time()}))


_files: dict[tuple[int, Path], ProcessFile] = {}  # process and folder -> file


def open_in(folder: Path) -> ProcessFile:
    """Return the file of this process in `folder`, the same one each time; raise OSError if it cannot be made."""
    key = os.getpid(), folder
    if key not in _files:
        _files[key] = ProcessFile(folder)
    return _files[key]


def has_file(folder: Path, pid: int) -> bool:
    """Return whether a process of this machine with that pid has made a file in `folder`."""
    with os.scandir(folder) as entries:
        return any(entry.name.startswith(_begin_name(pid)) for entry in entries)


def encode(line: dict[str, Any]) -> bytes:
    """Return a line of JSON."""
    return (json.dumps(line, default=str) + "\n").encode()


def _begin_name(pid: int) -> str:
    return f"{socket.gethostname()}-{pid}-"


def _describe() -> dict[str, Any]:
    pid = os.getpid()
    process = {"pid": pid, "parent": os.getppid(), "host": socket.gethostname(), "command": _command()}
    identity = {"started": process_identity.started(pid), "pid_space": process_identity.pid_space()}
    names = ("RANK", "LOCAL_RANK", "CUDA_VISIBLE_DEVICES", "DEVGUARD_SIM_STATE")
    variables = {name: os.environ[name] for name in names if name in os.environ}
    versions = {"devguard": __version__, "python": sys.version.split()[0]}
    torch = getattr(sys.modules.get("torch"), "__version__", None)  # not imported here: the guard may be off
    if torch is not None:
        versions["torch"] = str(torch)
    return {**process, **identity, **variables, "time": time.time(), **versions}


def _command() -> str:
    """Return the command line of the interpreter, which `multiprocessing` children have as well, without secrets."""
    return redact_command(getattr(sys, "orig_argv", sys.argv))
