"""SECURITY.md ships with the source, and promises what the code keeps."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "SECURITY.md").read_text(encoding="utf-8")


def test_the_page_is_in_the_source_distribution_and_linked() -> None:
    if sys.version_info < (3, 11):
        pytest.skip("tomllib came with Python 3.11")
    import tomllib

    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "SECURITY.md" in project["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    assert "(SECURITY.md)" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_page_names_the_way_to_report_and_no_address() -> None:
    assert "private security advisory" in PAGE
    assert not re.search(r"[\w.]+@[\w.]+\.\w+", PAGE)


@pytest.mark.parametrize("title", ["Report a vulnerability", "What is trusted", "What is not trusted", "Known limits"])
def test_the_page_has_its_parts(title: str) -> None:
    assert f"\n## {title}\n" in PAGE
