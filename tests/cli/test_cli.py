"""The ``devguard`` command itself: choosing a subcommand, and the exit status."""

from __future__ import annotations

import importlib
import types

import pytest

from devguard import ConfigError, __version__, cli


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
