"""The section on the report in docs/watch.md: its options exist, its numbers are the code's, its pictures are there."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from devguard.cli import report
from devguard.watch.report import page, run

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "watch.md").read_text(encoding="utf-8")
SECTION = PAGE.partition("\n## The report\n")[2].partition("\n## ")[0]


def test_each_command_is_valid_and_each_option_is_shown() -> None:
    parser = argparse.ArgumentParser()
    report.configure(parser)
    commands = re.findall(r"^devguard report ([^#\n]+)", SECTION, re.MULTILINE)
    shown = set()
    for command in commands:
        parser.parse_args(command.split())
        shown |= {word for word in command.split() if word.startswith("-")}
    options = {option for action in parser._actions for option in action.option_strings}
    assert options - shown == {"-h", "--help", "--output"}


def test_the_numbers_are_those_of_the_code() -> None:
    assert f"at most {page.MOST_BYTES // 1000} kB" in SECTION
    assert f"up to {run.MOST_MOMENTS} equal parts" in SECTION
    assert page.Limits().moments == run.MOST_MOMENTS


def test_the_pictures_are_there_and_small() -> None:
    pictures = re.findall(r"\]\((images/[^)]+)\)", SECTION)
    assert len(pictures) == 2
    assert all((DOCS / picture).stat().st_size < 150_000 for picture in pictures)
