"""docs/doors.md describes every door, and each example on that page prints what the page promises."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from devguard.doors.table import NAMES

PAGE = (Path(__file__).parents[2] / "docs" / "doors.md").read_text(encoding="utf-8")
PARTS = ("What goes wrong", "What devguard does", "What it cannot do", "How to switch it", "Example")
# A block that is run, the language of its fence being "python" alone, and the block of text that may follow.
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)


def _sections() -> dict[str, str]:
    """Return the text before the first door as "introduction", and the section of each door by its name."""
    introduction, *rest = re.split(r"^### (\w+)\n", PAGE, flags=re.MULTILINE)
    return {"introduction": introduction, **dict(zip(rest[::2], rest[1::2], strict=True))}


SECTIONS = _sections()
EXAMPLES = [
    pytest.param(code, output, id=name if number == 0 else f"{name}-{number}")
    for name, text in SECTIONS.items()
    for number, (code, output) in enumerate(BLOCK.findall(text))
]


def test_every_door_has_a_section_and_every_section_is_a_door():
    assert sorted(SECTIONS) == sorted([*NAMES, "introduction"])


@pytest.mark.parametrize("door", NAMES)
def test_the_section_of_a_door_has_its_five_parts_in_order(door: str):
    assert re.findall(r"^\*\*(.+)\*\*$", SECTIONS[door], re.MULTILINE) == list(PARTS)


@pytest.mark.parametrize("door", NAMES)
def test_the_table_links_to_the_section_of_a_door(door: str):
    assert f"\n| [{door}](#{door}) |" in SECTIONS["introduction"]


@pytest.mark.parametrize("door", NAMES)
def test_the_section_of_a_door_has_an_example(door: str):
    assert "\n```python" in SECTIONS[door]


@pytest.mark.parametrize(("code", "output"), EXAMPLES)
def test_an_example_prints_what_the_page_promises(
    run_simulated: Callable[..., Any], tmp_path: Path, code: str, output: str
):
    if "safetensors" in code:
        pytest.importorskip("safetensors")
    example = tmp_path / "example.py"
    example.write_text(code, encoding="utf-8")
    assert run_simulated([example], gpus=2).stdout == output
