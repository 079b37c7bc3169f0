"""``devguard run``: the variables that it sets, the program that it becomes, and the arguments that it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from devguard import cli
from devguard.cli import program
from devguard.reporting.sampler import RECORDED
from tests.helpers.simulated import ROOT


@pytest.fixture
def become(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The variables of devguard in the environment of the program that the command would have become."""
    variables: dict[str, str] = {}

    def record_variables(command: str, path: str, program: list[str], environment: dict[str, str]) -> int:
        variables.update({name: value for name, value in environment.items() if name.startswith("DEVGUARD")})
        return 0

    monkeypatch.setattr(program, "become", record_variables)
    for name in [name for name in os.environ if name.startswith("DEVGUARD") or "RANK" in name]:
        monkeypatch.delenv(name)
    return variables


def test_the_command_becomes_the_program_with_the_variables_set(tmp_path: Path) -> None:
    options = ["--mode", "warn", "--device", "cuda:1", "--doors", "ipc=error,threads=off", "--log", "logs"]
    command = [sys.executable, "-m", "devguard", "run", *options, "--", "sh", "-c", "echo $$; env; exit 7"]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("DEVGUARD")}
    environ["PYTHONPATH"] = str(ROOT)
    with subprocess.Popen(command, cwd=tmp_path, env=environ, stdout=subprocess.PIPE, text=True) as process:
        out, _ = process.communicate(timeout=60)
    pid, *variables = out.splitlines()
    assert process.returncode == 7
    assert int(pid) == process.pid
    assert sorted(line for line in variables if line.startswith("DEVGUARD")) == [
        "DEVGUARD=warn",
        "DEVGUARD_DEVICE=cuda:1",
        "DEVGUARD_DOORS=ipc=error,threads=off",
        f"DEVGUARD_LOG={tmp_path}/logs",
    ]


def test_a_relative_log_folder_of_the_environment_is_made_absolute(
    become: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DEVGUARD_LOG", "logs")
    assert cli.main(["run", "--", "true"]) == 0
    assert become == {"DEVGUARD": "repair", "DEVGUARD_LOG": f"{tmp_path}/logs"}


def test_record_marks_the_log_folder(
    become: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "logs"
    assert cli.main(["run", "--log", str(folder), "--record", "--", "true"]) == 0
    assert (folder / RECORDED).exists()
    assert become["DEVGUARD_LOG"] == str(folder)
    assert cli.main(["run", "--record", "--", "true"]) == 2
    assert "--record needs a log folder" in capsys.readouterr().err
    (folder / RECORDED).unlink()
    (folder / RECORDED).mkdir()
    monkeypatch.setattr(Path, "touch", Path.read_bytes)  # fails with an OSError
    assert cli.main(["run", "--log", str(folder), "--record", "--", "true"]) == 2
    assert "cannot be written: Is a directory. Choose another --log" in capsys.readouterr().err


def test_without_options_the_mode_comes_from_the_environment_or_is_repair(
    become: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["run", "--", "true"]) == 0
    assert become == {"DEVGUARD": "repair"}
    monkeypatch.setenv("DEVGUARD", "off")  # the kill switch
    assert cli.main(["run", "--", "true"]) == 0
    assert become == {"DEVGUARD": "off"}
    assert cli.main(["run", "--mode", "error", "--", "true"]) == 0
    assert become == {"DEVGUARD": "error"}


@pytest.mark.parametrize("option", ["--mode=observe", "--device=cuda:1", "--doors=ipc=error", "--log=logs"])
def test_tracing_enables_the_guard_only_with_an_option_for_guarding(
    become: dict[str, str], monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    from devguard import tracing

    def traced_environment(output: str | None, *, json: bool, base: dict[str, str]) -> dict[str, str]:
        return {**base, "DEVGUARD_TRACED": "yes"}

    monkeypatch.setattr(tracing, "environment", traced_environment)
    assert cli.main(["run", "--trace-contexts", "--", "true"]) == 0
    assert become == {"DEVGUARD_TRACED": "yes"}
    assert cli.main(["run", "--trace-contexts", option, "--", "true"]) == 0
    assert become["DEVGUARD"] == ("observe" if "mode" in option else "repair")
    name = option.partition("=")[0].removeprefix("--").upper()
    assert name == "MODE" or become[f"DEVGUARD_{name}"].endswith(option.partition("=")[2])


@pytest.mark.parametrize(
    ("options", "environ", "message"),
    [
        (["--mode", "repiar"], {}, "'repiar' is not a mode. Valid: off, observe, warn, repair, error"),
        (["--device", "gpu1"], {}, "is 'gpu1'. Valid: a device such as 'cuda:1'"),
        (["--device", "cuda:1"], {"LOCAL_WORLD_SIZE": "4"}, "would give one GPU to every process of this job"),
        (["--doors", "lod=warn"], {}, "there is no door 'lod'. Doors: artefacts, bare_cuda"),
        (["--doors", "load"], {}, "Valid: door=mode"),
        (["--doors", "load=wran"], {}, "'wran' is not a mode"),
        (["--log", __file__], {}, "is not a directory"),
        ([], {"DEVGUARD": "nonsense"}, "'nonsense' is not a mode"),
        ([], {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}, "keeps torch from loading devguard. Unset it"),
        (["--json"], {}, "only valid with --trace-contexts"),
    ],
)
def test_bad_options_and_variables_are_refused_with_what_is_valid(
    become: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    environ: dict[str, str],
    message: str,
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["run", *options, "--", "true"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("devguard run: ")
    assert message in err
    assert become == {}


def test_without_a_program_the_usage_is_printed(become: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "--mode", "repair"]) == 2
    assert "usage: devguard run [--mode MODE]" in capsys.readouterr().err


def test_a_program_that_does_not_exist_returns_127(become: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "--", "no-such-program"]) == 127
    assert capsys.readouterr().err == "devguard run: there is no program 'no-such-program' on PATH\n"


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The programs that the command would have become."""
    programs: list[list[str]] = []
    monkeypatch.setattr(program, "become", lambda command, path, words, environment: programs.append(words) or 0)
    monkeypatch.setattr(program, "find", lambda command, name: f"/bin/{name}")
    for name in [name for name in os.environ if name.startswith("DEVGUARD") or "RANK" in name]:
        monkeypatch.delenv(name)
    return programs


PROGRAM = ["torchrun", "--nproc-per-node", "2", "x.py", "--mode", "fix", "--json", "--", "-h"]


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--"],
        ["--mode", "warn"],
        ["--mode=warn", "--log", "logs"],
        ["--mode", "warn", "--device", "cuda:1", "--"],
        ["--mod", "warn"],
        ["--doors=ipc=error"],
    ],
)
def test_everything_from_the_first_word_that_is_no_option_is_the_program(
    ran: list[list[str]], options: list[str]
) -> None:
    assert cli.main(["run", *options, *PROGRAM]) == 0
    assert ran == [PROGRAM]


@pytest.mark.parametrize("words", [["python", "-S", "-m", "x", "-c"], ["./x", "--help"], ["-", "a"], ["run", "run"]])
def test_the_words_of_a_program_are_not_read(ran: list[list[str]], words: list[str]) -> None:
    assert cli.main(["run", "--mode", "off", *words]) == 0
    assert cli.main(["run", "--mode", "off", "--", *words]) == 0
    assert ran == [words, words]


@pytest.mark.parametrize(
    ("options", "environ", "words"),
    [
        (["--mode", "fix"], {}, "--mode fix: 'fix' is not a mode"),
        (["--device", "gpu1"], {}, "--device gpu1: the device is 'gpu1'"),
        (["--device", "cuda:1"], {"LOCAL_WORLD_SIZE": "4"}, "--device cuda:1 would give one GPU"),
        (["--doors", "lod=warn"], {}, "--doors lod=warn: there is no door 'lod'"),
        (["--doors", "load"], {}, "--doors load: 'load' cannot be read"),
        (["--log", __file__], {}, f"--log {__file__}: "),
    ],
)
def test_messages_name_what_the_user_wrote(
    ran: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    environ: dict[str, str],
    words: str,
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["run", *options, "true"]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert "DEVGUARD" not in err.partition("Valid")[0]
    assert ran == []


@pytest.mark.parametrize("flag", ["-S", "-I"])
def test_a_program_that_would_run_unguarded_is_not_started(tmp_path: Path, flag: str) -> None:
    python = tmp_path / "venv/bin/python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    environ = {name: value for name, value in os.environ.items() if not name.startswith("DEVGUARD")}
    command = [sys.executable, "-m", "devguard", "run", str(python), flag, "-c", "print('ran')"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{python} would run unguarded, so it was not started: {python} {flag} cannot import torch" in done.stderr
    done = subprocess.run([*command[:4], "--mode", "off", *command[4:]], env=environ, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "ran\n")


@pytest.mark.parametrize("option", ["--mode", "--device", "--doors", "--log", "--output"])
@pytest.mark.parametrize("value", ["", "  "])
def test_an_empty_value_is_refused(
    ran: list[list[str]], capsys: pytest.CaptureFixture[str], option: str, value: str
) -> None:
    for words in ([option, value], [f"{option}={value}"], ["--trace-contexts", option, value]):
        assert cli.main(["run", *words, "true"]) == 2
        assert capsys.readouterr().err == (
            f"devguard run: {option} has an empty value. Give it a value, or leave out {option}.\n"
        )
    assert ran == []
