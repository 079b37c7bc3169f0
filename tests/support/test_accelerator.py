"""Counting devices and listing contexts, without initialising anything."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import devguard
from devguard import DeviceResolutionError
from devguard.support import accelerator
from tests.helpers.fakecuda import FakeCuda

pytestmark = pytest.mark.usefixtures("clean")


def test_nothing_is_initialised_and_no_context_is_held_on_a_cpu_build() -> None:
    assert not accelerator.driver_is_initialized()
    assert accelerator.contexts() == ()
    assert devguard.contexts() == ()
    assert accelerator.bound_device() is None
    assert not torch.cuda.is_initialized()


def test_every_check_leaves_cuda_uninitialised() -> None:
    devguard.status()
    devguard.contexts()
    devguard.strays()
    devguard.owner()
    with devguard.guard("cpu"):
        devguard.status()
    assert not torch.cuda.is_initialized()


def test_without_torch_there_are_no_devices() -> None:
    program = (
        "from devguard.support import accelerator; import sys;"
        "print(accelerator.device_count(), accelerator.contexts(), accelerator.driver_is_initialized());"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "()", "False", "False"]


def test_contexts_are_looked_up_only_after_cuda_was_initialised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "_cuda_hasPrimaryContext", lambda index: index in (0, 2), raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert accelerator.contexts() == ()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert accelerator.contexts() == (0, 2)
    assert devguard.contexts() == (torch.device("cuda:0"), torch.device("cuda:2"))
    assert devguard.status()["contexts"] == ["cuda:0", "cuda:2"]


def test_a_process_forked_after_cuda_was_initialised_holds_no_context(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "_cuda_hasPrimaryContext", lambda index: True, raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    assert accelerator.contexts() == ()


def test_the_cpu_owner_never_touches_cuda() -> None:
    with FakeCuda().installed() as cuda:
        with devguard.guard("cpu"), devguard.remap("cpu"):
            pass
        assert cuda.calls == []


def test_the_first_entry_of_a_thread_sets_the_device_and_later_ones_exchange() -> None:
    with FakeCuda().installed() as cuda:
        with devguard.guard(1):
            pass
        with devguard.guard(2):
            pass
        assert cuda.calls == [("set", 1), ("maybe_exchange", 0), ("exchange", 2), ("maybe_exchange", 0)]


@pytest.mark.parametrize(
    ("count", "valid"),
    [
        (0, "no CUDA device is visible"),
        (1, "one device is visible, cuda:0"),
        (3, "3 devices are visible, cuda:0 to cuda:2"),
    ],
)
def test_out_of_range_lists_the_valid_indices(count: int, valid: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "device_count", lambda: count)
    error = accelerator.out_of_range("LOCAL_RANK=9", 9)
    assert isinstance(error, DeviceResolutionError)
    assert valid in str(error)
    assert "CUDA_VISIBLE_DEVICES" in str(error)


def test_listing_contexts_is_safe_before_a_fork() -> None:
    """A child that is forked after `contexts()` may still use CUDA: nothing was initialised."""
    program = """
import os, devguard, torch
devguard.contexts()
with devguard.guard("cpu"): pass
pid = os.fork()
if pid == 0:
    os._exit(torch.cuda._is_in_bad_fork())
os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    environ = {**os.environ, "PYTHONWARNINGS": "ignore"}
    assert subprocess.run([sys.executable, "-c", program], env=environ, check=False).returncode == 0


def test_a_gpu_owner_on_a_build_without_cuda_is_an_error_with_a_remedy() -> None:
    with pytest.raises(DeviceResolutionError, match="devguard sim"), devguard.guard("cuda:0"):
        pass
