"""The door ``bare_cuda`` on simulated GPUs: the device that ``"cuda"`` means to safetensors."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import load_file as early_load_file
from safetensors.torch import load_model, save_file

import devguard
from devguard import guard
from devguard.doors.arrivals import bare_cuda
from devguard.reporting.journal import journal
from tests.helpers.programs import PRELUDE, run_child

ORIGINAL = safetensors.safe_open


@pytest.fixture
def path(tmp_path) -> Path:
    save_file({"weight": torch.arange(8.0)}, tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"


def by_load_file(path: Path, device: Any) -> torch.Tensor:
    return early_load_file(path, device=device)["weight"]


def by_safe_open(path: Path, device: Any) -> torch.Tensor:
    with safetensors.safe_open(path, framework="pt", device=device) as file:
        return file.get_tensor("weight")


def by_position(path: Path, device: Any) -> torch.Tensor:
    with safetensors.safe_open(path, "pt", device) as file:
        return file.get_slice("weight")[:]


WAYS = [by_load_file, by_safe_open, by_position]


def found() -> list[tuple[str, str, str, str]]:
    return [(stray.door, stray.source, stray.target, stray.action) for stray in journal.strays()]


@pytest.mark.parametrize("load", WAYS)
class TestBareCuda:
    def test_unguarded_bare_cuda_means_gpu_0_even_if_another_is_current(self, load, path):
        torch.cuda.set_device(2)
        assert load(path, "cuda").device.index == 0

    def test_guarded_bare_cuda_means_the_owner(self, load, path):
        with guard(1):
            tensor = load(path, "cuda")
        assert tensor.device.index == 1
        assert tensor.cpu().tolist() == list(range(8))
        assert found() == [("bare_cuda", "cuda:0", "cuda:1", "repaired")]
        (stray,) = journal.strays()
        assert (stray.site.file, stray.site.function) == (__file__, load.__name__)
        assert stray.via == ("safetensors" if load is by_load_file else None)

    def test_observe_and_warn_record_and_error_refuses(self, load, path):
        with guard(1, mode="observe"):
            assert load(path, "cuda").device.index == 0
        with guard(1, doors={"bare_cuda": "warn"}), pytest.warns(devguard.StrayDeviceWarning, match="cuda:0"):
            assert load(path, "cuda").device.index == 0
        with guard(1, mode="error"), pytest.raises(devguard.StrayDeviceError, match="treats 'cuda' as GPU 0"):
            load(path, "cuda")
        assert [row[3] for row in found()] == ["observed", "warned", "refused"]

    def test_off_unguarded_and_uninstall_change_nothing(self, load, path):
        with guard(1), devguard.unguarded():
            assert load(path, "cuda").device.index == 0
        with guard(1, mode="off"):
            assert load(path, "cuda").device.index == 0
        with guard(1):
            devguard.uninstall()
            assert load(path, "cuda").device.index == 0
        assert found() == []

    def test_an_allowed_device_is_no_stray(self, load, path):
        devguard.allow("cuda:0")
        with guard(1, mode="error"):
            assert load(path, "cuda").device.index == 0
        assert found() == []

    def test_bare_cuda_is_no_stray_if_gpu_0_is_the_owner(self, load, path):
        with guard(0, mode="error"):
            assert load(path, "cuda").device.index == 0
        assert found() == []

    @pytest.mark.parametrize("device", ["cuda:2", 2])
    def test_an_explicit_device_wins_and_is_recorded(self, load, path, device):
        with guard(1):
            assert load(path, device).device.index == 2
        assert found() == [("bare_cuda", "cuda:2", "cuda:2", "kept")]
        with guard(1, mode="error"), pytest.raises(devguard.StrayDeviceError, match="never overrides"):
            load(path, device)
        with guard(1, mode="off"):
            assert load(path, device).device.index == 2
        assert [row[3] for row in found()] == ["kept", "refused"]

    @pytest.mark.parametrize("device", ["cuda:1", 1, "cpu"])
    def test_the_owners_device_and_the_host_are_no_strays(self, load, path, device):
        with guard(1, mode="error"):
            assert load(path, device).device in (torch.device("cuda:1"), torch.device("cpu"))
        assert found() == []

    def test_the_cpu_owner_takes_bare_cuda_as_an_explicit_device(self, load, path):
        with guard("cpu"):
            assert load(path, "cuda").device.index == 0
        assert found() == [("bare_cuda", "cuda:0", "cuda:0", "kept")]
        with guard("cpu", mode="error"), pytest.raises(devguard.StrayDeviceError, match="owns cpu"):
            load(path, "cuda")

    def test_safetensors_own_errors_are_raised(self, load, path):
        with guard(1, mode="error"), pytest.raises(safetensors.SafetensorError, match="invalid"):
            load(path, "nonsense")
        assert found() == []


def test_load_model_loads_onto_the_owner(path):
    model = torch.nn.Linear(8, 1, bias=False)
    model.weight = torch.nn.Parameter(torch.zeros(8))
    with guard(1):
        load_model(model, path, device="cuda")
    assert found() == [("bare_cuda", "cuda:0", "cuda:1", "repaired")]


class TestReplacedClass:
    def test_the_replacement_looks_like_the_original(self, path):
        with guard(1):
            ours = safetensors.safe_open
            assert ours is not ORIGINAL
            with ours(path, framework="pt") as file:
                assert isinstance(file, ours)
                assert type(file) is ORIGINAL
                assert list(file.keys()) == ["weight"]
            assert issubclass(ORIGINAL, ours)
            assert issubclass(ours, ours)
            assert not issubclass(int, ours)
            assert ours.get_tensor is ORIGINAL.get_tensor
            assert (ours.__name__, ours.__module__) == (ORIGINAL.__name__, ORIGINAL.__module__)
            assert isinstance(None, ours | None)
            with pytest.raises(AttributeError):
                ours.nothing  # noqa: B018
            with pytest.raises(TypeError, match="not an acceptable base type"):
                type("Sub", (ours,), {})

    def test_uninstall_restores_the_original(self):
        torch_module = sys.modules["safetensors.torch"]
        with guard(1):
            assert torch_module.safe_open is safetensors.safe_open is not ORIGINAL
        assert devguard.uninstall() == []
        assert torch_module.safe_open is safetensors.safe_open is ORIGINAL

    def test_a_copy_of_the_replacement_does_nothing_after_uninstall(self, path):
        with guard(1):
            copy = safetensors.safe_open
            devguard.uninstall()
            with copy(path, framework="pt", device="cuda") as file:
                assert file.get_tensor("weight").device.index == 0
        assert found() == []

    def test_the_status_names_early_copies_of_the_original(self):
        with guard(1):
            row = devguard.status()["doors"]["bare_cuda"]
        assert f"{__name__}.ORIGINAL" in row["early_copies"]
        assert not any(copy.startswith("safetensors.") for copy in row["early_copies"])
        assert row["watched"] == ["safetensors.safe_open", "safetensors.torch.safe_open"]

    def test_a_later_patch_stays_and_uninstall_names_it(self, monkeypatch):
        with guard(1):
            pass
        monkeypatch.setattr(safetensors, "safe_open", print)
        assert devguard.uninstall() == ["safetensors.safe_open"]
        monkeypatch.undo()
        safetensors.safe_open = ORIGINAL

    def test_a_safetensors_without_safe_open_is_a_problem_in_the_status(self):
        with guard(1):
            bare_cuda._patch_module(ModuleType("safetensors"))
            assert "safetensors.safe_open" in devguard.status()["doors"]["bare_cuda"]["problem"]


def child(code: str, *arguments: str) -> Any:
    """Run `code` in a fresh process; return the JSON that it prints."""
    return json.loads(run_child(code, prelude=PRELUDE + "import json\n", arguments=arguments, options=["-W", "error"]))


def test_unguarded_bare_cuda_opens_a_context_on_gpu_0(path):
    code = "from safetensors.torch import load_file\ntorch.cuda.set_device(1); load_file(sys.argv[1], device='cuda')\n"
    assert child(code + "print(ctx())", str(path)) == [0, 1]


def test_safetensors_imported_after_the_door_opened_is_watched_and_opens_no_other_context(path):
    code = """
with devguard.guard(1):
    assert "safetensors" not in sys.modules
    from safetensors.torch import load_file
    from safetensors import safe_open
    devices = [load_file(sys.argv[1], device="cuda")["weight"].device.index]
    with safe_open(sys.argv[1], "pt", device="cuda") as file:
        devices.append(file.get_tensor("weight").device.index)
left = devguard.uninstall()
import safetensors.torch
same = safetensors.safe_open is safetensors.torch.safe_open is safetensors._safetensors_rust.safe_open
with devguard.guard(1):
    again = load_file(sys.argv[1], device="cuda")["weight"].device.index
print(json.dumps([devices, ctx(), left, same, again]))
"""
    assert child(code, str(path)) == [[1, 1], [1], [], True, 1]


def test_safetensors_imported_while_the_door_is_closed_is_watched_once_it_opens_again(path):
    code = """
with devguard.guard(1): pass
devguard.uninstall()
from safetensors.torch import load_file
import safetensors.torch
same = safetensors.safe_open is safetensors.torch.safe_open is safetensors._safetensors_rust.safe_open
with devguard.guard(1):
    device = load_file(sys.argv[1], device="cuda")["weight"].device.index
print(json.dumps([same, device]))
"""
    assert child(code, str(path)) == [True, 1]


def test_a_copy_that_safetensors_makes_on_import_is_replaced_and_restored(path):
    code = """
import safetensors
with devguard.guard(1):
    import safetensors.torch
    row = devguard.status()["doors"]["bare_cuda"]["watched"]
devguard.uninstall()
print(json.dumps([row[0], safetensors.torch.safe_open is safetensors._safetensors_rust.safe_open]))
"""
    assert child(code, str(path)) == ["safetensors.safe_open", True]
