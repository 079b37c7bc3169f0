"""The door ``set_device`` on simulated GPUs: libraries that leave another device current, and code that does not."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import devguard
from devguard import guard
from devguard.doors.current_device import set_device
from devguard.ownership import in_force
from devguard.ownership.stack import local
from devguard.reporting.journal import journal
from tests.helpers.simulated import ROOT

LIBRARY = """
    import torch

    def clobber(index=0):
        torch.cuda.set_device(index)

    def clobber_deep(index=0):
        return [clobber(index)]

    def clobber_then(call, index=0):
        torch.cuda.set_device(index)
        return call()

    def by_accelerator(index=0):
        torch.accelerator.set_device_index(index)

    def by_stream(index=0):
        torch.cuda.set_stream(torch.cuda.default_stream(index))

    def by_accelerator_stream(index=0):
        torch.accelerator.set_stream(torch.cuda.default_stream(index))

    def loop_over_devices(back=True):
        before = torch.cuda.current_device()
        for index in range(torch.cuda.device_count()):
            torch.cuda.set_device(index)
        if back:
            torch.cuda.set_device(before)

    def pre_call(index):
        before = torch.cuda.current_device()
        torch.cuda.set_device(index)
        return before

    def post_call(before):
        torch.cuda.set_device(before)

    def operator(work, index=0):
        before = pre_call(index)
        got = work()
        post_call(before)
        return got

    def save_and_restore(work, index=0):
        before = torch.cuda.current_device()
        try:
            torch.cuda.set_device(index)
            return work()
        finally:
            torch.cuda.set_device(before)

    async def sleeps_between(index=0):
        import asyncio
        before = torch.cuda.current_device()
        torch.cuda.set_device(index)
        await asyncio.sleep(0)
        torch.cuda.set_device(before)
"""
LINE_OF_CLOBBER = 5


@pytest.fixture
def library(tmp_path: Path) -> Iterator[Any]:
    """A package other than the program."""
    yield from _module("somelib", tmp_path)


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Any]:
    """A second package."""
    yield from _module("otherlib", tmp_path)


def _module(name: str, folder: Path) -> Iterator[ModuleType]:
    path = folder / f"{name}.py"
    path.write_text(textwrap.dedent(LIBRARY))
    module = ModuleType(name)
    exec(compile(path.read_text(), str(path), "exec"), vars(module))
    yield module


def current() -> int:
    return torch.cuda.current_device()


def door() -> None:
    """Pass a door with a call that is no stray."""
    torch.frombuffer(bytearray(4), dtype=torch.uint8)


def found() -> list[tuple[str, str, str, int]]:
    return [(s.source, s.target, s.action, s.count) for s in journal.strays() if s.door == "set_device"]


REPAIRED = ("cuda:0", "cuda:1", "repaired", 1)


class TestALibraryThatLeavesAnotherDeviceCurrent:
    def test_unguarded_and_with_the_door_off_the_next_tensor_lands_there(self, library):
        torch.cuda.set_device(1)
        library.clobber()
        assert torch.empty(1, device="cuda").device.index == 0
        with guard(1, doors={"set_device": "off"}):
            library.clobber()
            door()
            assert torch.empty(1, device="cuda").device.index == 0
        assert found() == []

    @pytest.mark.parametrize("how", ["clobber", "clobber_deep", "by_accelerator", "by_stream", "by_accelerator_stream"])
    def test_the_device_is_repaired_at_the_next_door(self, library, how):
        with guard(1):
            getattr(library, how)()
            assert current() == 0
            door()
            assert current() == 1
            assert torch.empty(1, device="cuda").device.index == 1
        assert found() == [REPAIRED]
        assert current() == 0

    def test_the_stray_names_the_line_of_the_library(self, library):
        with guard(1):
            library.clobber_deep()
            door()
        (stray,) = (s for s in journal.strays() if s.door == "set_device")
        assert stray.site.file.endswith("somelib.py")
        assert (stray.site.line, stray.site.function.rpartition(".")[2]) == (LINE_OF_CLOBBER, "clobber")
        assert stray.note == "it was cuda:1; found at the next door"
        assert any(site.file == __file__ for site in stray.stack)

    def test_the_change_is_found_when_the_guard_is_left(self, library):
        with guard(1):
            library.clobber()
        assert found() == [REPAIRED]
        assert current() == 0
        torch.cuda.set_device(1)
        guard(1)(library.clobber)()
        assert found() == [(*REPAIRED[:3], 2)]
        assert current() == 1

    def test_the_change_is_found_when_a_task_ends(self, library):
        @guard(1)
        async def work():
            library.clobber()

        asyncio.run(work())
        assert found() == [REPAIRED]

    def test_the_change_is_found_by_end_task(self, library):
        devguard.install(device=1)

        def task() -> None:
            library.clobber()

        def run() -> None:
            torch.cuda.set_device(1)
            task()
            in_force.end_task()
            assert current() == 1

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert found() == [REPAIRED]

    def test_the_device_is_repaired_under_install_without_a_guard(self, library):
        devguard.install(device=1)
        library.clobber()
        door()
        assert current() == 1
        assert found() == [REPAIRED]

    def test_each_call_counts_once(self, library):
        with guard(1):
            for _ in range(3):
                library.clobber()
                door()
                door()
        assert found() == [(*REPAIRED[:3], 3)]

    def test_a_loop_that_ends_on_another_device_is_repaired(self, library):
        with guard(1):
            library.loop_over_devices(back=False)
            door()
            assert current() == 1
        assert found() == [("cuda:3", "cuda:1", "repaired", 1)]

    def test_observe_and_warn_leave_the_device_and_error_refuses_the_next_call(self, library):
        with guard(1, mode="observe"):
            library.clobber()
            door()
            door()
            assert current() == 0
        with guard(1, doors={"set_device": "warn"}), pytest.warns(devguard.StrayDeviceWarning, match="work went to"):
            library.clobber()
            door()
            assert current() == 0
        with guard(1, mode="error"):
            library.clobber()
            with pytest.raises(devguard.StrayDeviceError, match=r"work was about to go to cuda:0.*somelib\.py:5"):
                door()
        assert [(row[2], row[3]) for row in found()] == [("observed", 1), ("warned", 1), ("refused", 1)]

    def test_error_mode_at_the_exit_raises_but_not_over_another_exception(self, library):
        torch.cuda.set_device(2)
        with pytest.raises(devguard.StrayDeviceError, match=r"somelib\.py:5"), guard(1, mode="error"):
            library.clobber()
        assert current() == 2
        with pytest.raises(ZeroDivisionError), guard(1, mode="error"):
            library.clobber()
            1 / 0  # noqa: B018
        assert current() == 2
        assert found() == [("cuda:0", "cuda:0", "refused", 2)]

    def test_no_strays_raises_for_the_change(self, library):
        with pytest.raises(devguard.StrayDeviceError, match="set_device"), devguard.no_strays(), guard(1):
            library.clobber()

    def test_changes_of_two_libraries_are_judged_separately(self, library, other):
        with guard(1):
            library.clobber(0)
            other.save_and_restore(lambda: None, 2)
            assert current() == 0
            door()
            assert current() == 1
        assert found() == [REPAIRED]

    def test_a_nested_guard_leaves_the_change_to_the_outer_guard(self, library):
        with guard(1):
            library.clobber()
            with guard(2):
                door()
                assert current() == 2
            assert current() == 0
            door()
            assert current() == 1
        assert found() == [REPAIRED]


class TestCodeThatBehaves:
    """Code that restores the device, or that may choose it, is no stray in mode ``error``."""

    @pytest.fixture(params=["guard", "install"])
    def assert_no_stray(self, request: pytest.FixtureRequest) -> Iterator[Callable[[], None]]:
        """Make cuda:1 the owner. The function asserts that neither a door nor the end of the guard finds a stray."""
        only = {"set_device": "error"}
        with contextlib.ExitStack() as scope:
            if request.param == "install":
                devguard.install("off", 1, doors=only)  # torch checks contexts in other modes
            else:
                scope.enter_context(guard(1, doors=only))

            def check() -> None:
                door()
                assert current() == 1
                scope.close()
                assert found() == []

            yield check

    def test_a_loop_over_the_devices_that_restores_the_first(self, library, assert_no_stray):
        library.loop_over_devices()
        door()
        assert_no_stray()

    def test_a_loop_in_the_users_own_code(self, assert_no_stray):
        for index in range(torch.cuda.device_count()):
            torch.cuda.set_device(index)
            door()
        torch.cuda.set_device(1)
        assert_no_stray()

    @pytest.mark.parametrize("how", ["operator", "save_and_restore"])
    def test_a_change_that_the_same_package_undoes(self, library, how, assert_no_stray):
        assert getattr(library, how)(lambda: (door(), current())[1]) == 0
        assert_no_stray()

    def test_a_pair_of_calls_that_the_user_makes(self, library, assert_no_stray):
        before = library.pre_call(0)
        library.post_call(before)
        door()
        assert_no_stray()

    def test_a_change_that_the_user_undoes(self, library, assert_no_stray):
        before = current()
        library.clobber()
        torch.cuda.set_device(before)
        door()
        assert_no_stray()

    def test_a_change_by_a_library_that_still_runs(self, library, assert_no_stray):
        def work() -> None:
            door()
            assert current() == 0
            torch.cuda.set_device(1)

        library.clobber_then(work)
        assert_no_stray()

    def test_a_change_that_is_undone_after_an_exception(self, library, assert_no_stray):
        with pytest.raises(ZeroDivisionError):
            library.save_and_restore(lambda: 1 / 0)
        door()
        assert_no_stray()

    def test_streams_of_another_device_as_contexts(self, assert_no_stray):
        with torch.cuda.stream(torch.cuda.default_stream(2)):
            assert current() == 2
            door()
            assert current() == 2
        if hasattr(torch.Stream, "__enter__"):
            with torch.cuda.default_stream(2):
                door()
        with torch.cuda.device(3):
            door()
            assert current() == 3
        assert_no_stray()

    def test_the_owners_own_device_set_repeatedly(self, library, assert_no_stray):
        for _ in range(3):
            library.clobber(1)
            door()
        assert_no_stray()

    def test_a_coroutine_that_sleeps_before_it_undoes_its_change(self, library, assert_no_stray):
        async def main() -> None:
            await asyncio.gather(*(guard(1).run(library.sleeps_between()) for _ in range(3)))

        asyncio.run(main())
        assert_no_stray()

    def test_inside_unguarded_and_with_an_allowed_device(self, library, assert_no_stray):
        with devguard.unguarded():
            library.clobber()
            door()
            library.clobber(1)
        devguard.allow("cuda:2")
        library.clobber(2)
        door()
        assert current() == 2
        torch.cuda.set_device(1)
        assert_no_stray()

    def test_a_pool_whose_workers_choose_their_device(self, assert_no_stray):
        with ThreadPoolExecutor(1, initializer=torch.cuda.set_device, initargs=(3,)) as pool:
            pool.submit(lambda: None).result()
        assert_no_stray()

    def test_a_thread_that_chooses_its_device(self, assert_no_stray):
        seen = []

        def target() -> None:
            choose()
            door()
            seen.append(current())

        def choose() -> None:
            torch.cuda.set_device(2)

        thread = threading.Thread(target=target)
        thread.start()
        thread.join()
        assert seen == [2]
        assert_no_stray()


class TestAnExplicitContext:
    def test_a_repair_does_not_move_the_device_of_an_explicit_context(self, library):
        with guard(1):
            library.clobber(0)
            with torch.cuda.device(2):
                door()
                assert current() == 2
            assert current() == 0
            door()
            assert current() == 1
        assert found() == [REPAIRED]


def test_reading_the_owner_and_the_status_repairs_nothing(library):
    with guard(1, mode="error"):
        library.clobber()
        assert devguard.owner() == torch.device("cuda:1")
        assert devguard.status()["doors"]["set_device"]["pending"] == 1
        assert current() == 0
        torch.cuda.set_device(1)
        assert devguard.status()["doors"]["set_device"]["pending"] == 0


def test_the_program_may_change_the_device_and_its_libraries_may_not(tmp_path):
    (tmp_path / "somelib.py").write_text(textwrap.dedent(LIBRARY))
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent("""
        import torch, devguard, somelib
        from devguard.reporting.journal import journal

        def choose(index):
            torch.cuda.set_device(index)

        door = lambda: torch.frombuffer(bytearray(4), dtype=torch.uint8)
        with devguard.guard(1):
            choose(2); door(); print(torch.cuda.current_device())
            torch.cuda.set_device(1)
            somelib.clobber(); door(); print(torch.cuda.current_device())
        print([(s.door, s.site.line) for s in journal.strays()])
        """)
    )
    done = subprocess.run(
        [sys.executable, str(program)],
        capture_output=True,
        cwd=ROOT,
        check=False,
    )
    assert done.stdout.decode().split("\n")[:3] == ["2", "1", f"[('set_device', {LINE_OF_CLOBBER})]"], done.stderr


def test_no_frame_and_no_change_is_kept(library):
    class Big:
        pass

    import gc
    import weakref

    big = Big()
    alive = weakref.ref(big)

    def hold(big: Any) -> None:
        library.clobber()

    with guard(1):
        hold(big)
        del big
        gc.collect()
        assert alive() is None
        for index in range(100):
            library.clobber(index % 4)
        assert devguard.status()["doors"]["set_device"]["pending"] <= 1
    assert local.stack.changes == []


def test_threads_do_not_share_changes(library):
    moved, checked = threading.Event(), threading.Event()
    devguard.install(device=1)

    def clobbering() -> None:
        def task() -> None:
            torch.cuda.set_device(1)
            library.clobber()

        task()
        moved.set()
        checked.wait()

    thread = threading.Thread(target=clobbering)
    thread.start()
    moved.wait()
    door()
    assert current() == 1
    assert found() == []
    checked.set()
    thread.join()


def movers() -> dict[str, Callable[..., Any]]:
    return {name: getattr(torch._C, name) for name in set_device.MOVERS if hasattr(torch._C, name)}


def test_uninstall_restores_exactly_the_originals(library):
    before = movers()
    with guard(1):
        assert all(movers()[name] is not before[name] for name in before)
        library.clobber()
        assert devguard.uninstall() == []
        assert movers() == before
        door()
        assert current() == 0
    assert current() == 0
    assert found() == []


def test_a_torch_without_the_function_is_a_problem_in_the_status(monkeypatch):
    monkeypatch.delattr(torch._C, "_cuda_setDevice")
    devguard.install(device="cpu")
    row = devguard.status()["doors"]["set_device"]
    devguard.uninstall()
    assert not row["open"]
    assert "_cuda_setDevice: torch" in row["problem"]
