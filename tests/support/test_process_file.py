"""The file of one process in a log folder, which needs no started log."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from devguard.support import log_folder, process_file
from tests.helpers.simulated import ROOT


def test_a_process_has_one_file_in_a_folder_and_each_alert_once(tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    for text in ("first", "second", "first"):
        process_file.open_in(folder).write_alert(text)
    (file,) = folder.iterdir()
    first, *rest = map(json.loads, file.read_text().splitlines())
    assert first["process"]["pid"] == os.getpid()
    assert first["process"]["python"] == sys.version.split()[0]
    assert [line["alert"] for line in rest] == ["first", "second"]
    assert file.suffix == process_file.SUFFIX


def test_a_forked_child_has_a_file_of_its_own(tmp_path: Path) -> None:
    process_file.open_in(tmp_path).write_alert("parent")
    pid = os.fork()
    if pid == 0:
        process_file.open_in(tmp_path).write_alert("child")
        os._exit(0)
    os.waitpid(pid, 0)
    assert len(list(tmp_path.glob(f"*-{pid}-*"))) == len(list(tmp_path.glob(f"*-{os.getpid()}-*"))) == 1


def test_an_alert_without_a_log_needs_neither_torch_nor_wrapt(tmp_path: Path) -> None:
    code = """
import sys
sys.modules.update(dict.fromkeys(("torch", "wrapt")))
from devguard.support import notices
notices.alert("the guard is off")
"""
    environ = {**os.environ, "DEVGUARD_LOG": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environ, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "the guard is off\n")
    (file,) = tmp_path.iterdir()
    first, second = map(json.loads, file.read_text().splitlines())
    assert second["alert"] == "the guard is off"
    assert "torch" not in first["process"]


def test_a_temporary_folder_that_was_removed_does_not_come_back(tmp_path: Path) -> None:
    folder = tmp_path / f"{log_folder.TEMPORARY}x"
    folder.mkdir()
    assert process_file.ProcessFile(folder).path.parent == folder
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError, match="the command that made it has ended"):
        process_file.ProcessFile(folder)
    assert not folder.exists()
