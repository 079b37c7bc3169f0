"""Lines of source files that a log names: only those of Python files are read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from devguard.watch.report import source_line
from devguard.watch.report.source_line import Quote, quote

LATER = 1e12


def test_a_line_is_quoted_without_its_indent(tmp_path: Path) -> None:
    file = tmp_path / "train.py"
    file.write_text("def f():\n    return 1  # ä\n")
    assert quote(str(file), 2, LATER) == Quote("return 1  # ä")
    assert quote(str(file), 2, 1.0) == Quote("return 1  # ä", changed=True)
    assert quote(str(file), 3, LATER) == Quote()
    assert quote(str(file), 0, LATER) == Quote()


def test_a_long_line_is_cut(tmp_path: Path) -> None:
    file = tmp_path / "train.py"
    file.write_text("x" * 500)
    assert quote(str(file), 1, LATER).text == "x" * 200 + "..."


def test_nothing_else_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = tmp_path / "id_rsa"
    secret.write_text("secret\n")
    link, pipe, folder, big = (tmp_path / f"{name}.py" for name in ("link", "pipe", "folder", "big"))
    link.symlink_to(secret)
    os.mkfifo(pipe)
    folder.mkdir()
    big.write_text("x = 1\n")
    monkeypatch.setattr(source_line, "MOST_READ", 3)
    monkeypatch.chdir(tmp_path)
    for file in (secret, link, pipe, folder, big, "train.py", "<string>", "", "/a\0.py", tmp_path / "no.py"):
        assert quote(str(file), 1, LATER) == Quote(), file
