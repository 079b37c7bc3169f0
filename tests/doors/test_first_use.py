"""The record of the first initialisation of CUDA."""

from __future__ import annotations

import os

import pytest

from devguard.doors import first_use
from devguard.doors.first_use import Touch
from devguard.support.callsite import Frame, Origin

CODE = compile("0", "train.py", "eval")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_use, "_state", first_use._State())


def touch(code: object = CODE) -> Touch:
    origin = Origin(code, 7, "ray", (Frame(CODE, 7),))  # type: ignore[arg-type]
    return Touch(origin, os.getpid(), "MainThread", 5.0, True, "train")


def test_before_any_record_the_line_is_unknown() -> None:
    assert first_use.first() is None
    assert "open the doors earlier (devguard.install)" in first_use.describe()


def test_the_record_names_the_process_and_the_line() -> None:
    first_use.record(touch())
    assert first_use.first() == touch()
    assert first_use.describe() == f"by process {os.getpid()} at train.py:7 in <module>"


def test_without_a_line_of_user_code_the_innermost_frame_is_named() -> None:
    first_use.record(touch(None))
    assert "no line of user code; innermost: train.py:7 in <module>" in first_use.describe()


def test_a_record_is_plain_data() -> None:
    assert touch().as_dict() == {
        "site": "train.py:7 in <module>",
        "via": "ray",
        "pid": os.getpid(),
        "thread": "MainThread",
        "time": 5.0,
        "stack": ["train.py:7 in <module>"],
    }
    assert touch(None).as_dict()["site"] is None


def test_another_door_may_report_the_initialisation() -> None:
    assert first_use.door() == "first_touch"
    first_use.report_as("children")
    assert first_use.door() == "children"
