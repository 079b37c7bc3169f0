"""What becomes of a stray: what is allowed is none, and one that repeats is judged as the first was."""

from __future__ import annotations

import json
import os
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import devguard
from devguard import ConfigError, DeviceResolutionError
from devguard.ownership import in_force
from devguard.ownership.owner import CPU
from devguard.ownership.stack import Stack
from devguard.reporting import allowlist, log_file, rows, verdict
from devguard.reporting.journal import journal
from tests.helpers import tagging

PAYLOAD = tagging.dumps(torch.arange(4.0))  # tagged cuda:3


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    yield from tagging.fresh()


def loads_in(name: str) -> Any:
    """Unpickle the payload in a module called `name`."""
    module = types.ModuleType(name)
    exec("import pickle\ndef run(data):\n    return pickle.loads(data)", vars(module))
    return module.run(PAYLOAD)


def refused(name: str = __name__) -> bool:
    """Whether a stray to cuda:3 from a module of that name is refused."""
    with devguard.guard("cpu", mode="error"):
        try:
            loads_in(name)
        except devguard.StrayDeviceError:
            return True
        except RuntimeError as error:  # allowed: torch's CPU build says that it has no CUDA
            assert "CUDA" in str(error)  # noqa: PT017 - one of two outcomes
            return False
    raise AssertionError("the CPU build restored a CUDA tensor")


def test_an_allowed_device_is_left_alone_and_not_recorded() -> None:
    assert refused()
    count = len(devguard.strays())
    devguard.allow("cuda:3")
    assert not refused()
    assert len(devguard.strays()) == count


def test_another_device_stays_a_stray() -> None:
    devguard.allow("cuda:2", 4)
    assert refused()


@pytest.mark.parametrize("pattern", ["offload", "offload.*", ["other", "off*"]])
def test_by_module_pattern(pattern: Any) -> None:
    devguard.allow("cuda:3", modules=pattern)
    assert not refused("offload.worker")
    assert refused("serving.worker")


def test_patterns_add_up_and_no_pattern_means_all() -> None:
    devguard.allow("cuda:3", modules="a")
    devguard.allow("cuda:3", modules="b")
    assert not refused("a")
    assert not refused("b")
    assert refused("c")
    devguard.allow("cuda:3")
    assert not refused("c")


def test_uninstall_forgets() -> None:
    devguard.allow("cuda:3")
    devguard.uninstall()
    assert refused()


def test_bad_arguments() -> None:
    with pytest.raises(ConfigError, match=r"allow\('cuda:1'\)"):
        devguard.allow()
    with pytest.raises(DeviceResolutionError):
        devguard.allow("gpu")


def test_what_is_allowed_in_a_scope_is_allowed_only_there() -> None:
    devguard.allow("cuda:2")
    with allowlist.scoped():
        devguard.allow("cuda:3")
        assert not refused()
    assert refused()
    assert allowlist.is_allowed("cuda:2")


# --- the next stray of a call site is judged from memory, and must be judged the same ---


def stray(nbytes: int = 8, door: str = "load") -> bool:
    """One call site, for whoever owns the scope."""
    owner = in_force.owner()
    assert owner is not None
    return verdict.judge(door, "cuda:3", owner, nbytes, "Do not.", target=owner.tag)


def actions() -> dict[str, tuple[int, int]]:
    return {stray.action: (stray.count, stray.bytes) for stray in devguard.strays()}


def test_what_repeats_is_counted_with_its_bytes() -> None:
    with devguard.guard("cpu"):
        assert all(stray(nbytes) for nbytes in (1, 2, 3))
    assert actions() == {"repaired": (3, 6)}
    assert journal.total == 3


def test_a_scope_inside_and_the_scope_around_judge_for_themselves() -> None:
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


def test_the_scope_around_counts_as_much_as_the_innermost() -> None:
    inner = devguard.guard("cpu")
    for mode, repairs in (("repair", True), ("observe", False), ("repair", True)):
        with devguard.guard("cpu", mode=mode), inner:
            assert stray() is repairs
            assert stray() is repairs


def test_doors_of_one_line_are_kept_apart() -> None:
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


def test_install_and_uninstall_change_what_is_judged() -> None:
    for mode, repairs in (("repair", True), ("observe", False), ("repair", True)):
        devguard.install(mode, "cpu")
        assert [stray(), stray()] == [repairs] * 2
    devguard.uninstall()
    with devguard.guard("cpu"):
        assert stray()


def test_what_is_allowed_from_now_on_is_no_stray_from_now_on() -> None:
    with devguard.guard("cpu"):
        assert [stray(), stray()] == [True, True]
        devguard.allow("cuda:3")
        assert [stray(), stray()] == [False, False]
        allowlist.forget_allowed()
        devguard.allow("cuda:3", modules="nobody")
        assert [stray(), stray()] == [True, True]
        devguard.allow("cuda:3", modules=__name__)
        assert [stray(), stray()] == [False, False]
    assert actions() == {"repaired": (4, 32)}


def test_a_journal_that_was_cleared_starts_anew() -> None:
    with devguard.guard("cpu"):
        stray(), stray()
        journal.clear()
        stray()
    assert actions() == {"repaired": (1, 8)}


def test_a_full_journal_counts_what_it_drops(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_log_that_begins_later_is_told_of_each_from_then_on(tmp_path: Path) -> None:
    def written() -> list[int]:
        (file,) = tmp_path.iterdir()
        return [line["count"] for line in map(json.loads, file.read_text().splitlines()) if "stray" in line]

    with devguard.guard("cpu"):
        for number in range(9):
            if number == 5:
                log_file.start(tmp_path, last_look=lambda when: None)
            stray()
    try:
        assert written()[:2] == [6, 7]  # as it became known, and grown
        assert journal.log is not None
        journal.log.flush()
        assert written()[-1] == 9
        assert journal.total == 9
    finally:
        assert journal.log is not None
        journal.log.stop()


def test_a_row_has_no_more_tallies_than_threads_at_a_time() -> None:
    def work() -> None:
        for _ in range(3):
            with devguard.guard("cpu"):
                stray(), stray()

    addresses = []
    for _ in range(200):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        addresses.append(Stack())  # so that no thread's stack is where one was before
    (row,) = [row for row in journal._rows.values() if row.key[2] != "threads"]
    assert row.total() == (200 * 3 * 2, 200 * 3 * 2 * 8)
    assert len(row.tallies) <= rows.ROOM
    assert journal.total == 200 * 3 * 2


def test_a_tally_of_a_thread_that_lives_is_not_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "ROOM", 2)
    go = threading.Barrier(9)

    def work() -> None:
        with devguard.guard("cpu"):
            for _ in range(20):
                stray()
                go.wait()

    threads = [threading.Thread(target=work) for _ in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (row,) = [row for row in journal._rows.values() if row.key[2] != "threads"]
    assert row.total() == (9 * 20, 9 * 20 * 8)


def test_a_forked_child_counts_its_own() -> None:
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


def test_a_scope_that_slept_is_judged_by_the_scopes_around_it_now() -> None:
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
