"""A headless Chromium that tests drive by the DevTools protocol, over two pipes: no port and no package is needed."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["find", "open_browser", "Tab"]

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PATIENCE_S = 60.0


def find() -> str | None:
    """Return the program; None if there is none on this machine."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Tab:
    """One page in the browser.

    Attributes
    ----------
    problems : list of str
        What the console would show: exceptions, refused requests, violations of the content policy, dialogs.
    requests : list of str
        The addresses that the page asked for.
    """

    def __init__(self, process: subprocess.Popen[bytes], commands: int, answers: int) -> None:
        self._process, self._commands, self._answers = process, commands, answers
        self._read, self._number, self._session = b"", 0, ""
        self._events: list[dict[str, Any]] = []
        self.problems: list[str] = []
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol, and return its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            found = self._receive()
            if found.get("id") == self._number:
                assert "error" not in found, f"{method}: {found['error']}"
                result: dict[str, Any] = found["result"]
                return result

    def open(self, file: Path) -> None:
        """Open a file, and wait until it is loaded."""
        self._events.clear()
        self.problems.clear()
        self.requests.clear()
        self.call("Page.navigate", url=file.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._receive()

    def run(self, code: str) -> Any:
        """Return the value of an expression of JavaScript in the page."""
        found = self.call("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def press(self, key: str, code: int) -> None:
        """Press and release a key, such as ``"ArrowLeft"``, with its Windows key code."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def _receive(self) -> dict[str, Any]:
        end = time.monotonic() + PATIENCE_S
        while b"\0" not in self._read:
            ready, _, _ = select.select([self._answers], [], [], max(end - time.monotonic(), 0.0))
            data = os.read(self._answers, 1 << 16) if ready else b""
            assert data, f"the browser does not answer (exit status {self._process.poll()})"
            self._read += data
        first, _, self._read = self._read.partition(b"\0")
        found: dict[str, Any] = json.loads(first)
        if "method" in found:
            self._note(found)
        return found

    def _note(self, event: dict[str, Any]) -> None:
        self._events.append(event)
        name, known = event["method"], event["params"]
        if name == "Runtime.exceptionThrown":
            self.problems.append(str(known["exceptionDetails"]))
        elif name == "Runtime.consoleAPICalled":
            self.problems.append(str(known["args"]))
        elif name == "Log.entryAdded":
            self.problems.append(known["entry"]["text"])
        elif name == "Page.javascriptDialogOpening":
            self.problems.append(f"dialog: {known['message']}")
        elif name == "Network.requestWillBeSent":
            self.requests.append(known["request"]["url"])


@contextlib.contextmanager
def open_browser(program: str, folder: Path) -> Iterator[Tab]:
    """Start a browser with its files in `folder`, and end it."""
    command_out, command_in = os.pipe()
    answer_out, answer_in = os.pipe()
    arguments = [
        program,
        "--headless",
        "--remote-debugging-pipe",
        "--no-sandbox",  # Tests may run as root.
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        f"--user-data-dir={folder}",
        "about:blank",
    ]
    # The browser reads commands from descriptor 3, and writes answers to 4.
    ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (command_out, answer_in)]
    code = f"import os, sys; os.dup2({ends[0]}, 3); os.dup2({ends[1]}, 4); os.execv(sys.argv[1], sys.argv[1:])"
    with open(folder / "stderr", "wb") as log:
        process = subprocess.Popen([sys.executable, "-c", code, *arguments], pass_fds=ends, stdout=log, stderr=log)
    for end in (command_out, answer_in, *ends):
        os.close(end)
    try:
        yield Tab(process, command_in, answer_out)
    finally:
        os.close(command_in)  # The browser ends with the pipe.
        os.close(answer_out)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
