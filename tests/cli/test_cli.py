"""The ``devguard`` command itself: choosing a subcommand, and the exit status."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from devguard import ConfigError, __version__, cli
from tests.helpers.simulated import ROOT


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_a_module_that_configures_and_runs_it(command: str) -> None:
    module = importlib.import_module(f"devguard.cli.{command}")
    assert callable(module.configure)
    assert callable(module.run)


def test_without_a_command_the_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    out = capsys.readouterr().out
    assert all(command in out for command in cli.COMMANDS)


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"devguard {__version__}\n"


def test_an_unknown_command_is_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["dotcor"])
    assert stopped.value.code == 2
    assert "doctor" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [(ConfigError("no such folder"), 2, "devguard log: no such folder\n"), (KeyboardInterrupt(), 130, "")],
)
def test_an_error_becomes_a_message_and_an_exit_status(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    status: int,
    message: str,
) -> None:
    def run(arguments: object) -> int:
        raise error

    module = types.SimpleNamespace(configure=lambda parser: None, run=run)
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: module)
    assert cli.main(["log"]) == status
    assert capsys.readouterr().err == message


def shell(folder: Path, text: str) -> subprocess.CompletedProcess[str]:
    """Run a line of shell in which $D is the command, and $L a folder with a long log."""
    log = folder / "logs"
    log.mkdir(exist_ok=True)
    row = (
        '{"stray":%d,"door":"load","action":"repaired","source":"cuda:0","target":"cuda:1","count":1,"bytes":1,'
        '"pid":1,"via":null,"note":null,"site":{"file":"f","line":%d,"function":"g"}}\n'
    )
    (log / "1.jsonl").write_text("".join(row % (i, i) for i in range(2000)))
    environ = {name: value for name, value in os.environ.items() if not name.startswith("DEVGUARD")}
    environ |= {"PYTHONPATH": str(ROOT), "D": f"{sys.executable} -m devguard", "L": str(log)}
    return subprocess.run(["sh", "-c", text], env=environ, cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize("to", [">/dev/full", ">&-"])
@pytest.mark.parametrize("command", ["log $L", "log $L --json", "log $L --processes", "doctor", "doctor --json"])
def test_output_that_cannot_be_written_is_an_error(tmp_path: Path, command: str, to: str) -> None:
    done = shell(tmp_path, f"$D {command} {to}")
    reason = "it is closed" if to == ">&-" else "No space left on device"
    assert done.stderr == f"devguard {command.split()[0]}: standard output cannot be written: {reason}\n"
    assert done.returncode == 1


@pytest.mark.parametrize("command", ["", "--help", "--version", "log --help", "run --help"])
def test_a_full_disk_for_the_help_is_an_error(tmp_path: Path, command: str) -> None:
    done = shell(tmp_path, f"$D {command} >/dev/full")
    assert done.stderr.endswith("standard output cannot be written: No space left on device\n")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)


@pytest.mark.parametrize("to", [">&-", "2>&-", "<&-", ">&- 2>&- <&-"])
def test_the_program_gets_the_streams_that_the_command_has(tmp_path: Path, to: str) -> None:
    script = "import os, sys\nsys.exit(7 if os.path.exists('/proc/self/fd/1') else 8)"
    (tmp_path / "x.py").write_text(script)
    done = shell(tmp_path, f"$D run --mode off -- {sys.executable} x.py {to}")
    assert done.returncode == (8 if to.startswith(">") else 7)
    assert done.stderr == ""


def test_an_error_of_the_system_is_a_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(arguments: object) -> int:
        raise PermissionError(13, "Permission denied", "/a\x1b")

    module = types.SimpleNamespace(configure=lambda parser: None, run=run)
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: module)
    assert cli.main(["log"]) == 1
    assert capsys.readouterr().err == "devguard log: Permission denied: /a\\x1b\n"


@pytest.mark.parametrize(
    ("words", "usage"),
    [
        (["run", "-x", "python"], "usage: devguard run [--mode MODE]"),
        (["doctor", "extra"], "usage: devguard doctor "),
        (["doctor", "--jsn"], "usage: devguard doctor "),
        (["sim", "--gpu-count=2", "python"], "usage: devguard sim "),
        (["log", "a", "b"], "usage: devguard log "),
        (["watch", "logs", "python"], "usage: devguard watch "),
        (["--nonsense"], "usage: devguard [-h]"),
    ],
)
def test_bad_usage_shows_the_usage_of_the_command(
    capsys: pytest.CaptureFixture[str], words: list[str], usage: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith(usage)
    assert "unrecognized arguments: " in err
    assert ("A program is written after --" in err) == (words[0] == "watch")
