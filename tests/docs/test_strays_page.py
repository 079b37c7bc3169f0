"""docs/strays.md: its examples do what the page says, with stand-ins for the services; its tables are the code's."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

import devguard
from devguard.ownership.owner import CPU
from devguard.reporting import journal, verdict
from devguard.reporting.announcements import _registrations
from devguard.reporting.stray import Action
from tests.helpers import tagging
from tests.helpers.simulated import ROOT

pytestmark = pytest.mark.usefixtures("clean")

PAGE = (ROOT / "docs/strays.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)
BLOCKS = BLOCK.findall(PAGE)


def block_with(text: str) -> tuple[str, str]:
    """Return the only example that holds a text, and its output."""
    (found,) = [pair for pair in BLOCKS if text in pair[0]]
    return found


@pytest.fixture(autouse=True)
def _no_callbacks_stay() -> Iterator[None]:
    yield
    _registrations.clear()


def stray() -> None:
    """Stray three times at one line."""
    with devguard.guard("cpu"):
        for _ in range(3):
            verdict.judge("load", "cuda:3", CPU, 16, "", target="cpu")


def test_every_example_is_tested() -> None:
    tested = ("logging.basicConfig", "found.append", "sentry_sdk", "opentelemetry")
    assert [block_with(text) for text in tested] == BLOCKS


def test_the_log_has_the_line_of_the_page(tmp_path: Path) -> None:
    code, output = block_with("logging.basicConfig")
    (tmp_path / "example.py").write_text(code, encoding="utf-8")
    (tmp_path / "checkpoint.pt").write_bytes(tagging.save(torch.arange(4.0)))
    done = subprocess.run(
        [sys.executable, "-W", "error", "example.py"],
        cwd=tmp_path,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.stdout, done.stderr.replace(f"{tmp_path}/", "")) == ("", output)


def test_a_block_collects_the_strays(capsys: pytest.CaptureFixture[str]) -> None:
    code, output = block_with("found.append")
    exec(code, {"strays_three_times": stray})
    stray()
    assert capsys.readouterr().out == output


class Recorder:
    """A stand-in for a service: it keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    @contextlib.contextmanager
    def new_scope(self) -> Iterator[Any]:
        scope = types.SimpleNamespace(set_context=lambda name, data: self.told.append((name, data)))
        yield scope
        self.told.append(scope.fingerprint)

    def capture_message(self, text: str, level: str) -> None:
        self.told.append((text, level))

    def get_current_span(self) -> Recorder:
        return self

    def add_event(self, name: str, attributes: dict[str, Any]) -> None:
        self.told.append((name, attributes))


def test_an_error_tracker_gets_each_call_site_once(monkeypatch: pytest.MonkeyPatch) -> None:
    service = Recorder()
    monkeypatch.setitem(sys.modules, "sentry_sdk", service)  # type: ignore[arg-type]
    exec(block_with("sentry_sdk")[0], {})
    stray()
    (found,) = devguard.strays()
    context, message, fingerprint = service.told
    assert context == ("stray", found.as_dict() | {"count": 1, "bytes": 16})
    assert message == (f"load: cuda:3 -> cpu [owner cpu, repaired] 1 x, 16 bytes, at {found.site}", "info")
    assert fingerprint == ["devguard", "load", str(found.site)]


def test_a_span_gets_an_event(monkeypatch: pytest.MonkeyPatch) -> None:
    service = Recorder()
    monkeypatch.setitem(sys.modules, "opentelemetry", types.SimpleNamespace(trace=service))  # type: ignore[arg-type]
    exec(block_with("opentelemetry")[0], {})
    stray()
    (found,) = devguard.strays()
    assert found.site is not None
    assert service.told == [
        (
            "devguard.stray",
            {
                "devguard.door": "load",
                "devguard.action": "repaired",
                "devguard.source": "cuda:3",
                "code.file.path": __file__,
                "code.line.number": found.site.line,
            },
        )
    ]


def test_the_levels_are_those_of_the_code() -> None:
    from devguard.reporting.announcements import LEVELS

    rows = re.findall(r"^\| `(\w+)` \| `([A-Z]+)` \|", PAGE, re.MULTILINE)
    assert {action: logging.getLevelName(LEVELS[action]) for action in get_args(Action)} == dict(rows)


def test_the_fields_are_those_of_the_records(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "devguard")
    stray()
    fields = {name for name in vars(caplog.records[0]) if name.startswith("devguard_")}
    assert fields == set(re.findall(r"`(devguard_\w+)`", PAGE))


def test_the_limit_is_that_of_the_journal() -> None:
    assert f"reports {journal.MAX_ROWS} call sites at most" in PAGE


def test_the_readme_links_to_the_page() -> None:
    assert "(docs/strays.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
