"""The file of this process in a log folder, written without torch or wrapt: for alerts also where the guard is off."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

from devguard._version import __version__
from devguard.support.append_file import AppendFile
from devguard.support.redaction import redact_command

__all__ = ["encode", "open_in", "ProcessFile", "SUFFIX"]

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
        super().__init__(folder / f"{socket.gethostname()}-{os.getpid()}-{time.time_ns()}{SUFFIX}")
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


def encode(line: dict[str, Any]) -> bytes:
    """Return a line of JSON."""
    return (json.dumps(line, default=str) + "\n").encode()


def _describe() -> dict[str, Any]:
    process = {"pid": os.getpid(), "parent": os.getppid(), "host": socket.gethostname(), "command": _command()}
    ranks = {name: os.environ[name] for name in ("RANK", "LOCAL_RANK") if name in os.environ}
    return {**process, **ranks, "time": time.time(), "devguard": __version__}


def _command() -> str:
    """Return the command line of the interpreter, which `multiprocessing` children have as well, without secrets."""
    return redact_command(getattr(sys, "orig_argv", sys.argv))
