"""The environment of a program with traced contexts."""

from __future__ import annotations

from pathlib import Path

import pytest

from devguard import tracing
from devguard.tracing import library


@pytest.fixture(autouse=True)
def _library(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that is only a name."""
    monkeypatch.setattr(library, "library", lambda: Path("/cache/trace.so"))


@pytest.mark.parametrize(
    "before", ["/lib/a.so:/lib/b.so", "/lib/a.so /lib/b.so", "/cache/trace.so:/lib/a.so /lib/b.so"]
)
def test_libraries_that_are_preloaded_already_stay(before: str) -> None:
    assert tracing.environment(base={"LD_PRELOAD": before})["LD_PRELOAD"] == "/cache/trace.so:/lib/a.so:/lib/b.so"


def test_the_base_is_copied_and_the_settings_of_an_enclosing_trace_are_dropped() -> None:
    base = {"HOME": "/root", "DEVGUARD_TRACE_OUTPUT": "/old", "DEVGUARD_TRACE_FORMAT": "json"}
    assert tracing.environment(base=base) == {"HOME": "/root", "LD_PRELOAD": "/cache/trace.so"}
    assert "LD_PRELOAD" not in base


def test_the_output_is_absolute_and_existing_records_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "records").write_text("one\n")
    found = tracing.environment("records", json=True, base={})
    assert found["DEVGUARD_TRACE_OUTPUT"] == str(tmp_path / "records")
    assert found["DEVGUARD_TRACE_FORMAT"] == "json"
    assert (tmp_path / "records").read_text() == "one\n"


def test_an_output_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(tracing.TracingError, match=r"cannot write records to .*: Is a directory"):
        tracing.environment(tmp_path, base={})
