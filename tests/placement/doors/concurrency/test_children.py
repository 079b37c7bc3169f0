"""The door ``children``: the settings that child processes take over, and loader workers, which own no GPU."""

from __future__ import annotations

import io
import multiprocessing
import multiprocessing.process
import multiprocessing.reduction
import multiprocessing.spawn
from collections.abc import Iterator
from typing import Any

import pytest

import devguard
from devguard import guard
from devguard.doors.concurrency import children
from devguard.ownership.process import process
from tests.helpers import fresh, offspring

METHODS = ("fork", "spawn")
SETTINGS = "mode='observe', doors={'load': 'warn'}"


@pytest.fixture(scope="module", autouse=True)
def _server() -> Iterator[None]:
    yield
    fresh.stop()


def out(code: str) -> Any:
    """Run `code` in a process without CUDA; return the value of the expression on its last line."""
    *lines, last = code.splitlines()
    indent = last[: len(last) - len(last.lstrip())]
    code = "\n".join(["from tests.helpers import offspring", *lines, f"{indent}print(json.dumps({last.strip()}))"])
    return __import__("json").loads(fresh.run(code)["out"])


@pytest.mark.parametrize("method", METHODS)
class TestLoaderWorkers:
    def test_unguarded_workers_open_a_context_and_nothing_is_recorded(self, method):
        row = out(f"offspring.load({method!r})")
        assert (row["contexts"], row["strays"], row["owner"]) == ([0], [], None)

    def test_guarded_workers_own_cpu_and_opening_cuda_is_recorded(self, method):
        row = out(f"with devguard.guard('cpu', {SETTINGS}):\n  offspring.load({method!r})")
        assert (row["owner"], row["mode"], row["error"], row["contexts"]) == ("cpu", "observe", None, [0])
        (stray,) = row["strays"]
        assert (stray["door"], stray["source"], stray["action"]) == ("children", "cuda", "observed")
        assert (stray["site"]["file"], stray["site"]["line"]) == (offspring.__file__, offspring.TOUCH_LINE)

    def test_error_mode_refuses_before_a_context_is_opened(self, method):
        row = out(f"with devguard.guard('cpu', mode='error'):\n  offspring.load({method!r})")
        assert (row["error"], row["contexts"]) == ("StrayDeviceError", [])
        assert [stray["action"] for stray in row["strays"]] == ["refused"]

    def test_a_worker_that_stays_on_the_host_is_no_stray(self, method):
        row = out(f"with devguard.guard('cpu', mode='error'):\n  offspring.load({method!r}, offspring.StaysOnHost)")
        assert (row["owner"], row["strays"], row["failures"]) == ("cpu", [], [])

    def test_off_and_unguarded_leave_workers_alone(self, method):
        row = out(f"with devguard.guard('cpu', doors={{'children': 'off'}}):\n  offspring.load({method!r})")
        assert (row["owner"], row["strays"]) == (None, [])
        row = out(f"with devguard.guard('cpu'), devguard.unguarded():\n  offspring.load({method!r})")
        assert (row["owner"], row["strays"]) == (None, [])


@pytest.mark.parametrize("method", METHODS)
class TestSettings:
    def test_a_child_takes_over_the_modes_but_no_owner(self, method):
        row = out(f"with devguard.guard('cpu', {SETTINGS}):\n  offspring.run_in_child({method!r})")
        assert (row["owner"], row["owned"], row["mode"]) == (None, [], "observe")
        assert row["guarded"]["taken"] == {"mode": "observe", "doors": {"load": "warn"}, "loader_worker": False}
        assert (row["guarded"]["owner"], row["guarded"]["mode"], row["guarded"]["failures"]) == ("cpu", "observe", [])

    def test_a_child_takes_over_installed_modes_too(self, method):
        row = out(f"devguard.install('error', 'cpu', doors={{'buffers': 'warn'}})\noffspring.run_in_child({method!r})")
        assert (row["owner"], row["mode"]) == (None, "error")
        assert row["guarded"]["taken"]["doors"] == {"buffers": "warn"}

    def test_a_child_takes_over_the_allowed_devices(self, method):
        """Otherwise a program that allows a device would have strays in its loader workers."""
        code = f"with devguard.guard('cpu', mode='error'):\n  offspring.load({method!r})"
        allowed = "devguard.allow('cuda:0', modules='tests.helpers.*')\n"
        row = out(allowed + code)
        assert (row["owner"], row["error"], row["contexts"], row["strays"]) == ("cpu", None, [0], [])
        row = out(allowed.replace("tests.helpers", "offload") + code)
        assert (row["error"], row["contexts"]) == ("StrayDeviceError", [])

    def test_a_guard_with_default_settings_hands_nothing_on(self, method):
        row = out(f"with devguard.guard('cpu'), devguard.remap():\n  offspring.run_in_child({method!r})")
        assert (row["owner"], row["mode"], row["guarded"]["taken"]) == (None, "repair", None)

    def test_unguarded_in_the_parent_does_not_apply_to_the_child(self, method):
        code = f"devguard.install('warn', 'cpu')\nwith devguard.unguarded():\n  offspring.run_in_child({method!r})"
        assert out(code)["guarded"]["mode"] == "warn"

    def test_grandchildren_take_over_the_modes_too(self, method):
        code = (
            f"import multiprocessing\nmultiprocessing.set_start_method({method!r})\n"
            f"with devguard.guard('cpu', {SETTINGS}):\n"
            f"  offspring.run_in_child({method!r}, offspring.send_report_of_child)"
        )
        assert out(code)["guarded"]["mode"] == "observe"

    def test_the_parent_keeps_its_owner_and_modes(self, method):
        code = f"with devguard.guard('cpu', {SETTINGS}):\n  offspring.run_in_child({method!r})\n  offspring.report()"
        row = out(code)
        assert (row["owner"], row["mode"], row["taken"]) == ("cpu", "observe", None)

    def test_a_parent_that_owns_a_gpu_does_not_hand_it_on(self, method):
        row = out(f"with devguard.guard(1, {SETTINGS}):\n  offspring.run_in_child({method!r})")
        assert (row["owner"], row["owned"], row["contexts"], row["mode"]) == (None, [], [], "observe")


@pytest.mark.parametrize("method", METHODS)
class TestSettingsOfTheEnvironment:
    ACTIVATE = (
        "import os\nfrom devguard.activation.activate import activate\n"
        "os.environ.update(DEVGUARD='error', DEVGUARD_DOORS='jit=off'); activate()\n"
    )

    @pytest.mark.parametrize(
        "scope",
        ["devguard.guard(1, mode='observe')", "devguard.guard('cpu', doors={'load': 'off'})", "devguard.unguarded()"],
    )
    def test_the_childs_own_variable_comes_before_the_scope_of_the_parent(self, method, scope):
        if method == "fork" and "(1" in scope:
            scope = scope.replace("(1", "('cpu'")  # After a fork CUDA would not work.
        row = out(f"{self.ACTIVATE}with {scope}:\n  offspring.run_in_child({method!r})")
        assert (row["owner"], row["mode"], row["guarded"]["mode"]) == (None, "error", "error")

    def test_a_variable_that_is_set_for_the_child_counts(self, method):
        code = f"{self.ACTIVATE}os.environ['DEVGUARD'] = 'warn'\noffspring.run_in_child({method!r})"
        assert out(code)["mode"] == ("warn" if method == "spawn" else "error")  # A forked child has read it already.

    def test_what_the_parent_installed_comes_before_the_variable(self, method):
        code = f"{self.ACTIVATE}devguard.install('observe', 'cpu')\noffspring.run_in_child({method!r})"
        assert out(code)["mode"] == "observe"

    def test_a_loader_worker_takes_over_the_scope(self, method):
        row = out(f"{self.ACTIVATE}with devguard.guard('cpu', mode='observe'):\n  offspring.load({method!r})")
        assert (row["owner"], row["mode"], row["error"]) == ("cpu", "observe", None)


class TestForkServer:
    def test_a_loader_worker_owns_cpu(self):
        row = out("with devguard.guard('cpu', mode='error'):\n  offspring.load('forkserver')")
        assert (row["owner"], row["error"], row["contexts"]) == ("cpu", "StrayDeviceError", [])

    def test_a_child_takes_over_the_modes_but_no_owner(self):
        row = out(f"with devguard.guard(1, {SETTINGS}):\n  offspring.run_in_child('forkserver')")
        assert (row["owner"], row["owned"], row["mode"]) == (None, [], "observe")


class TestForkedAfterCuda:
    def test_unguarded_torch_names_no_line(self):
        code = "torch.ones(1, device='cuda')\noffspring.run_in_child('fork', offspring.try_cuda)"
        assert "devguard" not in out(code)

    def test_the_refusal_names_the_line_that_initialised_cuda(self):
        code = (
            "with devguard.guard(1):\n"
            "  torch.ones(1, device='cuda')\n"
            "  offspring.run_in_child('fork', offspring.try_cuda)"
        )
        message = out(code)
        assert message.startswith("Cannot re-initialize CUDA in forked subprocess")
        assert "at <string>:2 in <module>" in message  # entering the guard initialised CUDA

    def test_the_refusal_states_that_cuda_was_initialised_before_the_doors_opened(self):
        code = (
            "torch.ones(1, device='cuda')\n"
            "with devguard.guard(1):\n"
            "  offspring.run_in_child('fork', offspring.try_cuda)"
        )
        assert "before devguard's doors were opened" in out(code)

    def test_a_bare_fork_continues_the_program_with_its_owner(self):
        code = (
            "import os\n"
            "with devguard.guard('cpu'):\n"
            "  read, write = os.pipe(); pid = os.fork()\n"
            "  if pid == 0: os.write(write, str(devguard.owner()).encode()); os._exit(0)\n"
            "  os.waitpid(pid, 0)\n"
            "os.read(read, 9).decode()"
        )
        assert out(code) == "cpu"


def pickled(process: Any) -> bytes:
    """Return the bytes in which a start method sends a process object."""
    file = io.BytesIO()
    popen = multiprocessing.context
    popen.set_spawning_popen(object())
    try:
        multiprocessing.reduction.dump(process, file)  # type: ignore[attr-defined]
    finally:
        popen.set_spawning_popen(None)
    return file.getvalue()


class TestInstalling:
    def hooked(self) -> list[Any]:
        return [multiprocessing.process.BaseProcess.__dict__["_bootstrap"], vars(multiprocessing.reduction)["dump"]]

    def test_uninstall_restores_exactly(self):
        found = self.hooked()
        with guard(1):
            assert not any(now is then for now, then in zip(self.hooked(), found, strict=True))
            assert devguard.uninstall() == []
        assert all(now is then for now, then in zip(self.hooked(), found, strict=True))

    def test_the_pickle_of_a_process_changes_only_if_settings_are_handed_on(self, monkeypatch):
        process = multiprocessing.get_context("spawn").Process(target=offspring.report)
        plain = pickled(process)
        with guard(1):
            assert pickled(process) == plain
            with guard(1, mode="observe"):
                assert pickled(process) != plain
                monkeypatch.setattr(multiprocessing.spawn, "_python_exe", "/another/python")
                assert pickled(process) == plain

    def test_an_error_inside_devguard_does_not_end_the_child(self, monkeypatch):
        with guard(1, mode="observe"):
            monkeypatch.setattr(children, "_settings", lambda process: 1 / 0)
            assert offspring.run_in_child("spawn")["mode"] == "repair"
            assert devguard.status()["doors"]["children"]["failures"] == ["ZeroDivisionError: division by zero"]

    def test_the_childs_own_settings_take_precedence(self):
        devguard.install("warn", 1)
        children._arrive("observe", {}, False, {})
        assert (process.mode, devguard.status()["doors"]["children"]["taken_over"]) == ("warn", None)
