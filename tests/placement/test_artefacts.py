"""The door ``artefacts`` on real devices: exported, traced and scripted programs with a baked index."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.export
import torch.jit._serialization

import devguard
from devguard import guard, owners
from devguard.doors import artefacts
from devguard.journal import journal

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:`torch\.jit\."),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

ORIGINALS = (torch.export.load, torch.jit._serialization.wrap_cpp_module)


class Model(torch.nn.Module):
    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.zeros(4, device=self.device).to(x.device)


class OnGpu0(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.zeros(4, device="cuda:0").to(x.device)


class OnGpu1(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.zeros(4, device="cuda:1").to(x.device)


class OnHost(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.zeros(4, device="cpu").to(x.device)


SCRIPTED = {"cuda:0": OnGpu0, "cuda:1": OnGpu1, "cpu": OnHost}


def exported(device: str, path: Any) -> Callable[..., Any]:
    torch.export.save(torch.export.export(Model(device), (torch.ones(4),)), path)
    return lambda: torch.export.load(path)


def traced(device: str, path: Any) -> Callable[..., Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(Model(device), (torch.ones(4),), check_trace=False).save(str(path))
    return lambda **options: torch.jit.load(str(path), **options)


def scripted(device: str, path: Any) -> Callable[..., Any]:
    torch.jit.script(SCRIPTED[device]()).save(str(path))
    return lambda **options: torch.jit.load(io.BytesIO(path.read_bytes()), **options)


def found() -> list[tuple[str, str, str]]:
    return [(stray.door, stray.source, stray.action) for stray in journal.strays()]


@pytest.mark.parametrize("make", [exported, traced, scripted])
class TestBakedIndex:
    def test_unguarded_nobody_says_a_word_and_the_index_is_there(self, make, tmp_path):
        load = make("cuda:0", tmp_path / "x.pt2")
        torch.cuda.set_device(1)
        program = load()
        graph = program.graph if make is exported else program.inlined_graph
        assert "cuda:0" in str(graph)
        assert found() == []

    @pytest.mark.parametrize("mode", ["repair", "observe"])
    def test_is_detected_and_left(self, make, mode, tmp_path):
        load = make("cuda:0", tmp_path / "x.pt2")
        with guard(1, mode=mode):
            load()
        assert found() == [("artefacts", "cuda:0", "observed")]
        (stray,) = journal.strays()
        assert stray.site.file == __file__
        assert "x, first in" in stray.note

    def test_warn_and_error(self, make, tmp_path):
        load = make("cuda:0", tmp_path / "x.pt2")
        with guard(1, mode="warn"), pytest.warns(devguard.StrayDeviceWarning, match="cuda:0"):
            load()
        with guard(1, mode="error"), pytest.raises(devguard.StrayDeviceError, match="holds that device as a constant"):
            load()
        assert [row[2] for row in found()] == ["warned", "refused"]

    def test_off_unguarded_allowed_and_uninstalled(self, make, tmp_path):
        load = make("cuda:0", tmp_path / "x.pt2")
        with guard(1), devguard.unguarded():
            load()
        with guard(1, mode="off"):
            load()
        devguard.allow("cuda:0")
        with guard(1, mode="error"):
            load()
        devguard.uninstall()
        assert (torch.export.load, torch.jit._serialization.wrap_cpp_module) == ORIGINALS
        with guard(1):
            devguard.uninstall()
            load()
        assert found() == []

    @pytest.mark.parametrize("device", ["cuda:1", "cpu"])
    def test_the_owners_index_and_the_host_are_no_strays(self, make, device, tmp_path):
        load = make(device, tmp_path / "x.pt2")
        with guard(1, mode="error"):
            load()
        assert found() == []

    def test_the_cpu_owner(self, make, tmp_path):
        load = make("cuda:1", tmp_path / "x.pt2")
        with guard("cpu", mode="error"), pytest.raises(devguard.StrayDeviceError, match="owns cpu"):
            load()


@pytest.mark.parametrize("make", [traced, scripted])
def test_map_location_does_not_touch_the_constants(make, tmp_path):
    load = make("cuda:0", tmp_path / "x.pt")
    with guard(1):
        load(map_location="cuda:1")
    assert found() == [("artefacts", "cuda:0", "observed")]


def test_a_bare_cuda_is_the_current_device_and_no_stray(tmp_path):
    class Bare(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.zeros(4, device="cuda").to(x.device)

    torch.jit.script(Bare()).save(str(tmp_path / "x.pt"))
    with guard(1, mode="error"):
        torch.jit.load(str(tmp_path / "x.pt"))
    assert found() == []


def test_weights_that_lie_elsewhere_are_counted(tmp_path):
    class Weighted(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(4).to("cuda:0"))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.weight

    path = tmp_path / "x.pt2"
    torch.export.save(torch.export.export(Weighted(), (torch.zeros(4).to("cuda:0"),)), path)
    with guard(1):
        program = torch.export.load(path)
    elsewhere = program.state_dict["weight"].device.index != 1
    assert [stray.bytes for stray in journal.strays() if stray.door == "artefacts"] == ([16] if elsewhere else [])


def test_a_program_of_another_make_is_counted_and_breaks_nothing():
    with guard(1):
        artefacts._look(artefacts._constants_of_export(object()), owners.of_index(1))
        assert devguard.status()["doors"]["artefacts"]["unread_programs"] == 1
    assert found() == []


def test_a_torch_without_export_load_is_a_problem_in_the_status():
    with guard(1):
        artefacts._patch_export(ModuleType("torch.export"))
        assert "torch.export.load" in devguard.status()["doors"]["artefacts"]["problem"]
