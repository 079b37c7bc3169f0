"""The door ``interop`` on simulated GPUs: tensors that arrive by DLPack."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils.dlpack

import devguard
from devguard import guard
from devguard.reporting.journal import journal

ORIGINAL = torch.from_dlpack
TAKES_DEVICE = "device" in inspect.signature(ORIGINAL).parameters  # torch 2.9


class Foreign:
    """Another framework's array, of 32 bytes."""

    def __init__(self, device: str) -> None:
        self.tensor = torch.empty(8, device=device)
        self.nbytes = self.tensor.nbytes

    def __dlpack__(self, **options: Any) -> Any:
        if self.tensor.is_cpu:
            return self.tensor.__dlpack__(**options)
        with torch.cuda.device(self.tensor.device):  # newer torch exports from the current device only
            return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.tensor.__dlpack_device__()


def capsule(device: str) -> Any:
    return torch.utils.dlpack.to_dlpack(torch.empty(8, device=device))


def found() -> list[tuple[str, str, str, int]]:
    return [(stray.door, stray.source, stray.action, stray.bytes) for stray in journal.strays()]


@pytest.mark.parametrize("take", [lambda x: torch.from_dlpack(x), lambda x: torch.utils.dlpack.from_dlpack(x)])
@pytest.mark.parametrize("make", [Foreign, capsule])
class TestFromDlpack:
    def test_unguarded_the_tensor_stays_and_is_not_recorded(self, make, take):
        external = make("cuda:0")
        torch.cuda.set_device(1)
        assert take(external).device.index == 0
        assert found() == []

    @pytest.mark.parametrize("mode", ["repair", "observe"])
    def test_a_tensor_on_another_device_is_recorded_and_stays(self, make, take, mode):
        external = make("cuda:0")
        with guard(1, mode=mode):
            assert take(external).device.index == 0
        assert found() == [("interop", "cuda:0", "observed", 32)]
        assert journal.strays()[0].site.file == __file__

    def test_warn_warns_and_error_refuses(self, make, take):
        external = make("cuda:0")
        with guard(1, mode="warn"), pytest.warns(devguard.StrayDeviceWarning, match="32 bytes went to cuda:0"):
            take(external)
        external = make("cuda:0")
        with guard(1, mode="error"), pytest.raises(devguard.StrayDeviceError, match="The memory is on that device"):
            take(external)
        assert [row[2] for row in found()] == ["warned", "refused"]

    def test_off_unguarded_allowed_and_uninstall_record_nothing(self, make, take):
        with guard(1), devguard.unguarded():
            take(make("cuda:0"))
        with guard(1, mode="off"):
            take(make("cuda:0"))
        with guard(1, mode="error"):
            external = make("cuda:0")
            devguard.allow("cuda:0")
            take(external)
        devguard.uninstall()
        assert torch.from_dlpack is torch.utils.dlpack.from_dlpack is ORIGINAL
        with guard(1):
            devguard.uninstall()
            take(make("cuda:0"))
        assert found() == []

    @pytest.mark.parametrize("device", ["cuda:1", "cpu"])
    def test_a_tensor_on_the_owner_or_the_host_is_no_stray(self, make, take, device):
        external = make(device)
        with guard(1, mode="error"):
            assert str(take(external).device) == device
        assert found() == []

    def test_the_cpu_owner_refuses_gpu_memory_in_mode_error(self, make, take):
        external = make("cuda:0")
        with guard("cpu", mode="error"), pytest.raises(devguard.StrayDeviceError, match="owns cpu"):
            take(external)


def test_a_torch_tensor_on_the_owner_is_no_stray():
    with guard(1, mode="error"):
        assert torch.from_dlpack(torch.empty(8, device="cuda")).device.index == 1


def test_a_numpy_array_is_no_stray():
    with guard(1, mode="error"):
        assert torch.from_dlpack(np.arange(4)).tolist() == [0, 1, 2, 3]


def test_error_mode_refuses_before_the_tensor_is_made():
    taken = []

    class Watched(Foreign):
        def __dlpack__(self, **options: Any) -> Any:
            taken.append(options)
            return super().__dlpack__(**options)

    external = Watched("cuda:0")
    with guard(1, mode="error"), pytest.raises(devguard.StrayDeviceError):
        torch.from_dlpack(external)
    assert taken == []


@pytest.mark.parametrize("version", [None, (1, 0)])
def test_error_mode_refuses_a_capsule_before_it_is_taken(version):
    tensor = torch.empty((2, 3), dtype=torch.float64, device="cuda:0")
    options = (
        {"max_version": version} if version and "max_version" in inspect.signature(tensor.__dlpack__).parameters else {}
    )
    external = tensor.__dlpack__(**options)
    with guard(1, mode="error"), pytest.raises(devguard.StrayDeviceError, match="48 bytes were about to go to cuda:0"):
        torch.utils.dlpack.from_dlpack(external)
    with guard(1):
        taken = torch.utils.dlpack.from_dlpack(external)  # refused, and so not consumed
    assert taken.data_ptr() == tensor.data_ptr()
    with guard(1, mode="error"), pytest.raises(RuntimeError, match=r"(?i)dltensor|consumed|capsule"):
        torch.utils.dlpack.from_dlpack(external)  # consumed: torch's own error


def test_the_capsule_of_a_scalar_has_its_bytes():
    with guard(1):
        torch.from_dlpack(torch.utils.dlpack.to_dlpack(torch.zeros((), dtype=torch.int16, device="cuda:0")))
    assert found() == [("interop", "cuda:0", "observed", 2)]


@pytest.mark.parametrize(
    ("device", "expected"),
    [("cuda:2", ["kept"]), ("cuda:1", []), ("cpu", []), (torch.device("cuda:2"), ["kept"])],
    ids=str,
)
def test_an_explicit_device_wins(device, expected):
    external = Foreign("cuda:0")
    if not TAKES_DEVICE:
        with guard(1), pytest.raises(TypeError, match="device"):
            torch.from_dlpack(external, device=device)
        return
    with guard(1):
        assert torch.from_dlpack(external, device=device).device == torch.device(device)
    assert [row[2] for row in found()] == expected
    with guard(1, mode="off"):
        torch.from_dlpack(external, device=device)
    assert [row[2] for row in found()] == expected
    if expected:
        with guard(1, mode="error"), pytest.raises(devguard.StrayDeviceError, match="never overrides"):
            torch.from_dlpack(external, device=device)


def test_torchs_own_errors_are_raised():
    with guard(1, mode="error"), pytest.raises((TypeError, RuntimeError, AttributeError)):
        torch.from_dlpack(object())
    with guard(1, mode="error"), pytest.raises(TypeError):
        torch.from_dlpack()


def test_the_status_names_unwatched_protocols_and_early_copies():
    with guard(1):
        row = devguard.status()["doors"]["interop"]
    assert any("__cuda_array_interface__" in what for what in row["not_watched"])
    assert f"{__name__}.ORIGINAL" in row["early_copies"]


def test_as_tensor_and_tensor_are_not_patched():
    before = torch.as_tensor, torch.tensor
    with guard(1):
        assert (torch.as_tensor, torch.tensor) == before
