"""Device memory and events that are shared between processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.helpers.simulated import Finished

Run = Callable[..., Finished]
PROGRAM = Path(__file__).with_name("sharing.py")


def test_memory_and_events_are_shared_between_processes(run_simulated: Run) -> None:
    done = run_simulated([PROGRAM, "memory"], gpus=3)
    parent, *children = done.state
    assert len(children) == 3
    assert [child.name for child in children] == ["multiprocessing child"] * 3
    assert parent.name == "sharing.py"
    assert sum(device.ipc_opens for device in parent.devices) == 0


def test_four_processes_and_four_threads_at_once(run_simulated: Run) -> None:
    done = run_simulated([PROGRAM, "stress"], gpus=4)
    assert len(done.state) == 5
    assert not any(process.alive for process in done.state)
    assert [device.bytes for process in done.state for device in process.devices] == [0] * 20
    assert all(device.ipc_opens > 0 for device in done.state[1].devices)


def test_a_pickle_holds_the_bytes_and_the_device_of_a_tensor(run_simulated: Run) -> None:
    done = run_simulated([PROGRAM, "pickle"], gpus=2)
    assert [device.context for device in done.me.devices] == [False, True]
