"""Names of source files that mean the same on another machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from devguard.logs import paths as log_paths

NAMES = {
    "/srv/program/serve.py": ("serve.py", "serve.py"),
    "/srv/program/models/../models/vision.py": ("models/vision.py", "models/vision.py"),
    "/srv/programs/serve.py": ("/srv/programs/serve.py", None),
    "serve.py": ("serve.py", "serve.py"),
    "./serve.py": ("serve.py", "serve.py"),
    "../serve.py": ("../serve.py", None),
    "/srv/program/.venv/lib/python3.11/site-packages/zmq/sugar.py": (
        "site-packages/zmq/sugar.py",
        ".venv/lib/python3.11/site-packages/zmq/sugar.py",
    ),
    "/usr/lib/python3/dist-packages/site-packages/x.py": ("site-packages/x.py", None),
    "<string>": ("<string>", None),
    "": ("", None),
    "/srv/program/a\0b.py": ("/srv/program/a\0b.py", None),
}


@pytest.mark.parametrize("file", NAMES, ids=repr)
def test_a_file_is_named_without_what_differs_between_machines(file: str) -> None:
    assert (log_paths.name_file(file, "/srv/program"), log_paths.name_inside(file, "/srv/program")) == NAMES[file]


def test_a_root_may_be_a_link_or_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    real, link = tmp_path / "real", tmp_path / "link"
    assert log_paths.name_file(f"{real}/serve.py", str(link)) == "serve.py"
    assert log_paths.name_file(f"{link}/serve.py", str(link)) == "serve.py"
    monkeypatch.chdir(real)
    assert log_paths.name_file(f"{real}/serve.py", ".") == "serve.py"
    assert log_paths.name_file("/srv/serve.py", "/") == "srv/serve.py"
