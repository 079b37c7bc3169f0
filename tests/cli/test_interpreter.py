"""The Python of a program, and whether devguard can guard it."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest

from devguard._version import __version__
from devguard.cli import interpreter
from devguard.cli.interpreter import Interpreter


@pytest.mark.parametrize(
    ("words", "flags", "sees_cwd"),
    [
        (["x.py", "-S"], (), False),
        (["-m", "x", "-I"], (), True),
        (["-c", "pass", "-I"], (), True),
        (["-S", "-W", "ignore", "-Xdev", "x.py"], ("-S",), False),
        (["-IEc", "pass"], ("-I", "-E"), True),
        (["-uBm", "x"], (), True),
        (["-W", "-S", "x.py"], (), False),
        (["-"], (), True),
        ([], (), True),
        (["--check-hash-based-pycs", "always", "-s", "-P", "x.py"], ("-s", "-P"), False),
    ],
)
def test_a_python_keeps_the_flags_before_its_script(words: list[str], flags: tuple[str, ...], sees_cwd: bool) -> None:
    for name in ("python", "python3", "python3.13t"):
        path = f"/usr/bin/{name}"
        assert interpreter.find(path, [name, *words]) == Interpreter(path, flags, sees_cwd)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("#!/v/bin/python3\nimport torch", Interpreter("/v/bin/python3", (), False)),
        ("#!/v/bin/python -sE\n", Interpreter("/v/bin/python", ("-s", "-E"), False)),
        ("#!/bin/sh\n'''exec' \"/long/python3.12\" \"$0\" \"$@\"\n' '''\n", Interpreter("/long/python3.12", (), False)),
        ("#!/bin/sh\n'''exec' /a/python \"$0\" \"$@\"\n", Interpreter("/a/python", (), False)),
        ("#!/bin/sh\nexec python x.py\n", None),
        ("#!/usr/bin/env bash\n", None),
        ("#!", None),
        ("#!/usr/bin/env\n", None),
        ("\x7fELF\udcff", None),
        ("", None),
    ],
)  # fmt: skip
def test_a_script_names_its_python_in_its_first_lines(tmp_path: Path, text: str, found: Interpreter | None) -> None:
    script = tmp_path / "torchrun"
    script.write_bytes(text.encode(errors="surrogateescape"))
    assert interpreter.find(str(script), ["torchrun", "-S", "x.py"]) == found


def test_env_finds_the_python_on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python3"
    python.symlink_to(sys.executable)
    monkeypatch.setenv("PATH", str(tmp_path))
    for line in ("#!/usr/bin/env python3", "#!/usr/bin/env -S A=1 python3 -E"):
        (tmp_path / "script").write_text(f"{line}\n")
        found = interpreter.find(str(tmp_path / "script"), ["script"])
        assert found is not None
        assert found.path == str(python)


def test_this_python_has_no_problem() -> None:
    assert interpreter.find_problem(Interpreter(sys.executable, (), False), os.environ) is None


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python without packages."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False, symlinks=True)
    return folder


def package(site: Path, name: str, version: str, entry: str = "") -> None:
    """Put a package with this version into a folder."""
    module = "devguard" if "devguard" in name else name
    (site / module).mkdir(parents=True, exist_ok=True)
    (site / module / "__init__.py").touch()
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(entry)


ENTRY = "[torch.backends]\ndevguard = devguard.autoload:activate\n"
GOOD: dict[str, tuple[str, str]] = {
    "torch": ("2.13.0+cu130", ""),
    "wrapt": ("2.0.1", ""),
    "torch-devguard": (__version__, ENTRY),
}


@pytest.mark.parametrize(
    ("changes", "flags", "message"),
    [
        ({}, (), None),
        ({"torch": None}, (), "cannot import torch. Install it there:"),
        ({"torch": ("2.5.1", "")}, (), "has torch 2.5.1, and devguard needs 2.6 or newer"),
        ({"wrapt": None}, (), "cannot import wrapt"),
        ({"wrapt": ("1.17.2", "")}, (), "has wrapt 1.17.2, and devguard needs 2.0 or newer"),
        ({"torch-devguard": None}, (), "cannot import devguard"),
        ({"torch-devguard": (__version__, "")}, (), "is not installed there, so torch does not load it"),
        ({"torch-devguard": ("0.0.1", ENTRY)}, (), "has devguard 0.0.1, and this command belongs to"),
        ({}, ("-E",), "cannot import torch. Leave out the flags"),
        ({}, ("-I",), "cannot import torch. Leave out the flags"),
    ],
)
def test_what_is_missing_is_named(
    bare: Path, tmp_path: Path, changes: dict[str, Any], flags: tuple[str, ...], message: str | None
) -> None:
    for name, found in (GOOD | changes).items():
        if found is not None:
            package(tmp_path, name, *found)
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path)}
    problem = interpreter.find_problem(Interpreter(str(bare / "bin/python"), flags, False), environ)
    assert (problem is None) == (message is None)
    assert (message or "") in (problem or "")


def test_the_probe_runs_neither_torch_nor_code_of_the_working_folder(
    bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, found in GOOD.items():
        package(tmp_path / "site", name, *found)
    (tmp_path / "site/torch/__init__.py").write_text("raise SystemExit('torch was imported')")
    monkeypatch.chdir(tmp_path)
    python = str(bare / "bin/python")
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path / "site")}
    assert interpreter.find_problem(Interpreter(python, (), False), environ) is None


@pytest.mark.parametrize("text", ["exit 3", "echo '{'", "echo 1 2"])
def test_a_python_that_does_not_answer_is_left_to_the_program(tmp_path: Path, text: str) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{text}\n")
    python.chmod(0o755)
    assert interpreter.find_problem(Interpreter(str(python), (), False), os.environ) is None
    assert subprocess.run([python], capture_output=True).stderr == b""


@pytest.mark.parametrize("sees_cwd", [False, True])
def test_the_probe_executes_nothing_of_the_working_folder(
    bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], sees_cwd: bool
) -> None:
    for name, found in GOOD.items():
        package(tmp_path / "site", name, *found)
    (tmp_path / "here").mkdir()
    for name in {*sys.stdlib_module_names, "torch", "wrapt", "devguard"} - {"sys"}:
        (tmp_path / f"here/{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r})\n")
    monkeypatch.chdir(tmp_path / "here")
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path / "site")}
    assert interpreter.find_problem(Interpreter(str(bare / "bin/python"), (), sees_cwd), environ) is None
    assert not (tmp_path / "ran").exists()
    assert capsys.readouterr().err == ""


def test_a_package_of_the_working_folder_counts_where_the_program_sees_it(
    bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, found in GOOD.items():
        package(tmp_path, name, *found)
    monkeypatch.chdir(tmp_path)
    python, environ = str(bare / "bin/python"), {"PATH": os.environ["PATH"]}
    assert interpreter.find_problem(Interpreter(python, (), True), environ) is None
    assert "cannot import torch" in str(interpreter.find_problem(Interpreter(python, (), False), environ))


@pytest.mark.parametrize("name", ["wrapt", "devguard"])
@pytest.mark.parametrize("text", ["raise ImportError('broken')", "raise SystemExit('broken')", "1 / 0  # broken"])
def test_a_package_that_cannot_be_imported_is_noticed(bare: Path, tmp_path: Path, name: str, text: str) -> None:
    for each, found in GOOD.items():
        package(tmp_path, each, *found)
    (tmp_path / f"{name}/__init__.py").write_text(f"print('loading', end='')\n{text}\n")
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path)}
    problem = str(interpreter.find_problem(Interpreter(str(bare / "bin/python"), (), False), environ))
    error = {"r": "broken", "1": "ZeroDivisionError: division by zero"}[text[0]]
    assert f"cannot import {name} (" in problem
    assert error in problem


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("echo no such library >&2; exit 3", "status 3: no such library"),
        ("echo '{'", "its answer cannot be read"),
        ("echo 1", "its answer cannot be read"),
        ("echo '[]'", "its answer cannot be read"),
        ("echo '{}'", "does not tell"),
        ("""echo '{"python": 3}'""", "does not tell"),
        ("printf '\\377'", "its answer cannot be read"),
        ("kill -9 $$", "status -9"),
    ],
)
def test_a_python_that_does_not_answer_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, why: str
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{text}\n")
    python.chmod(0o755)
    found = Interpreter(str(python), (), False)
    assert interpreter.find_problem(found, {}) is None
    err = capsys.readouterr().err
    assert err.startswith(f"devguard run: warning: {python} does not tell whether devguard can guard it (")
    assert why in err
    assert why in str(interpreter.find_problem(found, {"DEVGUARD_STRICT": "1"}))


def test_a_damaged_package_does_not_hide_the_others(bare: Path, tmp_path: Path) -> None:
    for name, found in GOOD.items():
        package(tmp_path, name, *found)
    for name, text in (("aaa-1.dist-info", None), ("bbb-1.dist-info", b"\xff\xfe"), ("zzz-1.dist-info", b"")):
        (tmp_path / name).mkdir()
        if text is not None:
            (tmp_path / name / "METADATA").write_bytes(text)
            (tmp_path / name / "entry_points.txt").write_bytes(text or b"[[")
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path)}
    assert interpreter.find_problem(Interpreter(str(bare / "bin/python"), (), False), environ) is None
