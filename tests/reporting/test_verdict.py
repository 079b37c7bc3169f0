"""Verdicts: what each mode does with a stray, and that a repeated stray is judged as the first one was."""

from __future__ import annotations

import inspect
import json
import os
import pickle
import threading
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import devguard
from devguard import StrayDeviceError, StrayDeviceWarning
from devguard.ownership import in_force
from devguard.ownership.owner import CPU
from devguard.reporting import allowlist, log_file, verdict
from devguard.reporting.journal import journal
from tests.helpers import tagging

pytestmark = pytest.mark.usefixtures("clean")

PAYLOAD = tagging.dumps(torch.arange(4.0))  # tagged cuda:3


def stray(nbytes: int = 8, door: str = "load") -> bool:
    """Judge a stray at one call site, for the owner in force."""
    owner = in_force.owner()
    assert owner is not None
    return verdict.judge(door, "cuda:3", owner, nbytes, "Do not.", target=owner.tag)


def actions() -> dict[str, tuple[int, int]]:
    return {stray.action: (stray.count, stray.bytes) for stray in devguard.strays()}


def test_a_repeated_stray_is_counted_with_its_bytes() -> None:
    with devguard.guard("cpu"):
        assert all(stray(nbytes) for nbytes in (1, 2, 3))
    assert actions() == {"repaired": (3, 6)}
    assert journal.total == 3


def test_an_inner_and_an_outer_scope_judge_independently() -> None:
    with devguard.guard("cpu"):
        for _ in range(3):
            assert stray()
            with devguard.guard("cpu", mode="observe"):
                assert not stray()
            with devguard.guard("cpu", doors={"load": "off"}):
                assert not stray()
            with devguard.guard("cpu", mode="error"), pytest.raises(devguard.StrayDeviceError):
                stray()
    assert actions() == {"repaired": (3, 24), "observed": (3, 24), "refused": (3, 24)}


def test_the_mode_of_the_outer_scope_is_read_at_each_entry() -> None:
    inner = devguard.guard("cpu")
    for mode, repairs in (("repair", True), ("observe", False), ("repair", True)):
        with devguard.guard("cpu", mode=mode), inner:
            assert stray() is repairs
            assert stray() is repairs


def test_strays_of_two_doors_at_one_line_are_counted_separately() -> None:
    with devguard.guard("cpu", doors={"jit": "observe"}):
        for _ in range(2):
            assert [stray(door=door) for door in ("load", "jit")] == [True, False]
    assert {(s.door, s.action, s.count) for s in devguard.strays()} == {("load", "repaired", 2), ("jit", "observed", 2)}


def test_two_calls_on_one_line_are_one_call_site() -> None:
    with devguard.guard("cpu"):
        for _ in range(2):
            owner = CPU
            verdict.judge("load", "cuda:3", owner, 1, "", "cpu"), verdict.judge("load", "cuda:3", owner, 1, "", "cpu")
    assert actions() == {"repaired": (4, 4)}


def test_install_and_uninstall_change_the_verdict_at_a_known_call_site() -> None:
    for mode, repairs in (("repair", True), ("observe", False), ("repair", True)):
        devguard.install(mode, "cpu")
        assert [stray(), stray()] == [repairs] * 2
    devguard.uninstall()
    with devguard.guard("cpu"):
        assert stray()


def test_allow_changes_the_verdict_at_a_known_call_site() -> None:
    with devguard.guard("cpu"):
        assert [stray(), stray()] == [True, True]
        devguard.allow("cuda:3")
        assert [stray(), stray()] == [False, False]
        allowlist.forget_allowances()
        devguard.allow("cuda:3", modules="another")
        assert [stray(), stray()] == [True, True]
        devguard.allow("cuda:3", modules=__name__)
        assert [stray(), stray()] == [False, False]
    assert actions() == {"repaired": (4, 32)}


def test_a_cleared_journal_counts_from_zero() -> None:
    with devguard.guard("cpu"):
        stray(), stray()
        journal.clear()
        stray()
    assert actions() == {"repaired": (1, 8)}


def test_a_full_journal_counts_the_strays_it_drops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "_max_rows", 0)
    with devguard.guard("cpu"):
        stray(), stray()
    assert (devguard.strays(), journal.total, journal.dropped) == ((), 2, 2)


def test_threads_that_stray_at_one_line_lose_no_count() -> None:
    def work() -> None:
        with devguard.guard("cpu"):
            for _ in range(500):
                stray()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert actions() == {"repaired": (4000, 32000)}


def test_a_log_started_later_records_each_later_stray(tmp_path: Path) -> None:
    def written() -> list[int]:
        (file,) = tmp_path.iterdir()
        return [line["count"] for line in map(json.loads, file.read_text().splitlines()) if "stray" in line]

    try:
        with devguard.guard("cpu"):
            for number in range(9):
                if number == 5:
                    log_file.start(tmp_path, last_look=lambda when: None)
                stray()
                assert number < 5 or written() == [number + 1]
        assert journal.total == 9
    finally:
        assert journal.log is not None
        journal.log.stop()


def test_a_forked_child_counts_its_own_strays_only() -> None:
    with devguard.guard("cpu"):
        stray(), stray()
        receiver, sender = os.pipe()
        pid = os.fork()
        if not pid:
            with devguard.guard("cpu"):
                stray()
            os.write(sender, repr(actions()).encode())
            os._exit(0)
        os.waitpid(pid, 0)
        assert os.read(receiver, 1000) == repr({"repaired": (1, 8)}).encode()
    assert actions() == {"repaired": (2, 16)}


def test_a_resumed_coroutine_is_judged_by_the_scopes_that_enclose_it_now() -> None:
    @types.coroutine
    def suspend() -> Iterator[None]:
        yield

    async def work() -> list[bool]:
        judged = []
        with devguard.guard("cpu"):
            for _ in range(3):
                judged.append(stray())
                await suspend()
        return judged

    def step(coroutine: Any, mode: Any) -> None:
        with devguard.guard("cpu", mode=mode):
            next(coroutine)

    steps = devguard.guard("cpu").steps(work())
    for mode in ("repair", "observe", "repair"):
        step(steps, mode)
    with pytest.raises(StopIteration) as stopped:
        next(steps)
    assert stopped.value.value == [True, False, True]


@pytest.mark.parametrize(
    ("chosen", "landed", "actions"),
    [
        ("off", ["cuda:3"], []),
        ("observe", ["cuda:3"], ["observed"]),
        ("repair", [], ["repaired"]),
    ],
)
def test_off_and_observe_let_it_land_and_repair_does_not(chosen: Any, landed: list[str], actions: list[str]) -> None:
    with tagging.landings() as seen, devguard.guard("cpu", mode=chosen):
        pickle.loads(PAYLOAD)
    assert seen == landed
    assert [stray.action for stray in devguard.strays()] == actions


def test_mode_error_raises_before_anything_lands() -> None:
    with (
        tagging.landings() as seen,
        devguard.guard("cpu", mode="error"),
        pytest.raises(StrayDeviceError, match=r"cuda:3.*owns cpu"),
    ):
        pickle.loads(PAYLOAD)
    assert seen == []
    assert [stray.action for stray in devguard.strays()] == ["refused"]


def test_mode_warn_lets_it_land_and_warns() -> None:
    with (
        tagging.landings() as seen,
        devguard.guard("cpu", mode="warn"),
        pytest.warns(StrayDeviceWarning, match="cuda:3"),
    ):
        pickle.loads(PAYLOAD)
    assert seen == ["cuda:3"]
    assert [stray.action for stray in devguard.strays()] == ["warned"]


def test_warn_warns_once_per_call_site_at_the_users_line() -> None:
    with tagging.landings(), devguard.guard("cpu", mode="warn"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            pickle.loads(PAYLOAD)
            first = inspect.currentframe().f_lineno - 1  # type: ignore[union-attr]
        pickle.loads(PAYLOAD)
    assert [(one.category, one.filename, one.lineno) for one in caught] == [
        (StrayDeviceWarning, __file__, first),
        (StrayDeviceWarning, __file__, first + 2),
    ]
    assert "16 bytes went to cuda:3; this scope owns cpu" in str(caught[0].message)
    assert [stray.count for stray in devguard.strays()] == [3, 1]


def test_a_warning_that_filters_make_an_error_leaves_the_result_and_is_printed_once_with_its_line(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with tagging.landings(), devguard.guard("cpu", mode="warn"), warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            assert pickle.loads(PAYLOAD).shape == (4,)
            line = inspect.currentframe().f_lineno - 1  # type: ignore[union-attr]
    out, err = capfd.readouterr()
    assert out == ""
    assert err == f"{__file__}:{line}: StrayDeviceWarning: load: 16 bytes went to cuda:3; this scope owns cpu.\n"


def test_no_failing_display_of_warnings_reaches_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise LookupError

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", fail)
        monkeypatch.setattr("sys.stderr", None)
        with tagging.landings(), devguard.guard("cpu", mode="warn"):
            assert pickle.loads(PAYLOAD).shape == (4,)
        monkeypatch.undo()
    assert [stray.action for stray in devguard.strays()] == ["warned"]


def test_an_error_names_the_devices_the_owner_the_call_site_and_the_remedy() -> None:
    with devguard.guard("cpu", mode="error"), pytest.raises(StrayDeviceError) as caught:
        pickle.loads(PAYLOAD)
    (stray,) = devguard.strays()
    message = str(caught.value)
    for part in ("load:", "16 bytes", "cuda:3", "owns cpu", f"{__file__}:", "map_location", "mode='repair'"):
        assert part in message
    assert str(stray.site) in message
    assert stray.action == "refused"


def test_an_error_survives_pickling() -> None:
    with devguard.guard("cpu", mode="error"), pytest.raises(StrayDeviceError) as caught:
        pickle.loads(PAYLOAD)
    back = pickle.loads(pickle.dumps(caught.value))
    assert type(back) is StrayDeviceError
    assert str(back) == str(caught.value)


def test_mode_warn_warns_once_of_a_device_that_the_program_names() -> None:
    with devguard.guard("cpu", mode="warn"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            verdict.obey("load", "cuda:3", CPU, 16)
    assert [str(warning.message) for warning in caught] == [
        "load: 16 bytes went to cuda:3; this scope owns cpu (the program names that device itself)."
    ]
    assert caught[0].category is StrayDeviceWarning
    assert caught[0].filename == __file__
    assert [(stray.action, stray.count) for stray in devguard.strays()] == [("kept", 3)]


@pytest.mark.parametrize("mode", ["observe", "repair"])
def test_other_modes_keep_a_named_device_without_a_warning(mode: Any) -> None:
    with devguard.guard("cpu", mode=mode):
        verdict.obey("load", "cuda:3", CPU, 16)  # Warnings are errors here.
    assert [stray.action for stray in devguard.strays()] == ["kept"]
