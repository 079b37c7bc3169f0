"""docs/transport.md: its examples print what the page says, its links lead somewhere, its numbers are the code's."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from devguard import transport
from devguard.transport import handle, ledger, server
from tests.helpers.simulated import ROOT

DOCS = ROOT / "docs"
PAGE = (DOCS / "transport.md").read_text(encoding="utf-8")
# A block that is run, and the text after it.
BLOCK = re.compile(r"^```python\n(.*?)^```\n\n```text\n(.*?)^```\n", re.MULTILINE | re.DOTALL)
EXAMPLES = BLOCK.findall(PAGE)
ON_GPUS = "# on simulated GPUs\n"


@pytest.mark.skipif(sys.platform != "linux", reason="transport needs Linux")
@pytest.mark.parametrize(("code", "output"), [pair for pair in EXAMPLES if ON_GPUS not in pair[0]])
def test_an_example_prints_what_the_page_promises(tmp_path: Path, code: str, output: str) -> None:
    (tmp_path / "example.py").write_text(code, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "error", tmp_path / "example.py"],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.stdout, done.stderr) == (output, "")


@pytest.mark.parametrize(("code", "output"), [pair for pair in EXAMPLES if ON_GPUS in pair[0]])
def test_an_example_for_gpus_prints_what_the_page_promises(
    run_simulated: Callable[..., Any], tmp_path: Path, code: str, output: str
) -> None:
    (tmp_path / "example.py").write_text(code, encoding="utf-8")
    assert run_simulated(["-W", "error", tmp_path / "example.py"], gpus=2).stdout == output


def test_every_python_block_is_run() -> None:
    assert len(EXAMPLES) == PAGE.count("```python\n") > 0


def test_every_public_name_is_on_the_page() -> None:
    values = {"LeaseUsage", "Reader", "Usage"}  # made by usage() and join(), which are there
    missing = [name for name in set(transport.__all__) - values if not re.search(rf"\b{name}\b", PAGE)]
    assert not missing


def test_the_numbers_are_those_of_the_code() -> None:
    assert f"{ledger.MAX_LEASES:,} leases" in PAGE
    assert f"below {handle.INLINE >> 10} KiB" in PAGE
    assert f"after {ledger.IDLE:g} seconds" in PAGE
    assert f"of {ledger.SEGMENT >> 20} MiB" in PAGE
    assert f"has waited {server.SLOW:g} s" in PAGE


def test_every_link_leads_to_a_file_or_a_section() -> None:
    sections = {
        "#" + re.sub(r"[^\w ]", "", title).lower().replace(" ", "-") for title in re.findall(r"^#+ (.+)$", PAGE, re.M)
    }
    for target in re.findall(r"\]\(([^)]+)\)", PAGE):
        assert target in sections or (DOCS / target).exists(), target


def test_the_readme_links_to_the_page() -> None:
    assert "(docs/transport.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
