"""The table of ``devguard watch`` as output, with and without rich."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from devguard.cli import watch_output
from devguard.errors import ConfigError
from devguard.watch.matrix import Matrix
from tests.watch.screen.test_table import gpus, rank

MATRIX = Matrix(0.0, gpus(2), (rank(0, (1, "STRAY", 900 << 20)),))


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm-256color")


def test_a_pipe_gets_text_and_a_terminal_colours(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    watch_output.show_matrix(MATRIX, as_json=False)
    assert capsys.readouterr().out == watch_output.as_text(MATRIX) + "\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    watch_output.show_matrix(MATRIX, as_json=False)
    out = capsys.readouterr().out
    assert "STRAY 900.0 MiB" in out
    assert "\x1b[" in out


def test_without_rich_a_terminal_gets_text(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    watch_output.show_matrix(MATRIX, as_json=False)
    assert capsys.readouterr().out == watch_output.as_text(MATRIX) + "\n"


def test_json_is_the_matrix(capsys: pytest.CaptureFixture[str]) -> None:
    watch_output.show_matrix(MATRIX, as_json=True)
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(MATRIX.as_dict()))


def test_a_picture_has_the_words_of_the_table(tmp_path: Path) -> None:
    watch_output.save_picture(MATRIX, tmp_path / "watch.svg")
    words = "".join(ElementTree.parse(tmp_path / "watch.svg").getroot().itertext()).replace("\xa0", " ")
    assert "STRAY 900.0 MiB" in words
    with pytest.raises(ConfigError, match="cannot be written: No such file or directory"):
        watch_output.save_picture(MATRIX, tmp_path / "no" / "watch.svg")


def test_what_needs_rich_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    watch_output.require_rich("--svg", "leave out --svg")
    monkeypatch.setitem(sys.modules, "rich", None)
    with pytest.raises(ConfigError, match=r"--svg needs rich\. .*\[watch\]'; or leave out --svg\."):
        watch_output.require_rich("--svg", "leave out --svg")
