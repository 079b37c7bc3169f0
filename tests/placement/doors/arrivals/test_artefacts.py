"""The door ``artefacts`` on simulated GPUs: exported, traced and scripted programs with a baked index."""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.export
import torch.jit._serialization

import devguard
from devguard import guard
from devguard.doors.arrivals import artefacts
from devguard.ownership.owner import owner_of_index
from devguard.reporting.journal import journal
from tests.helpers.programs import run_child

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
    def test_unguarded_the_baked_index_stays_and_is_not_recorded(self, make, tmp_path):
        load = make("cuda:0", tmp_path / "x.pt2")
        torch.cuda.set_device(1)
        program = load()
        graph = program.graph if make is exported else program.inlined_graph
        assert "cuda:0" in str(graph)
        assert found() == []

    @pytest.mark.parametrize("mode", ["repair", "observe"])
    def test_a_baked_index_is_recorded_and_an_exported_one_repaired(self, make, mode, tmp_path):
        load = make("cuda:0", tmp_path / "x.pt2")
        with guard(1, mode=mode):
            load()
        repaired = mode == "repair" and make is exported
        assert found() == [("artefacts", "cuda:0", "repaired" if repaired else "observed")]
        (stray,) = journal.strays()
        assert stray.site.file == __file__
        assert ("x in the program" if repaired else "x, first in") in stray.note

    def test_warn_warns_and_error_refuses(self, make, tmp_path):
        load = make("cuda:0", tmp_path / "x.pt2")
        with guard(1, mode="warn"), pytest.warns(devguard.StrayDeviceWarning, match="cuda:0"):
            load()
        with guard(1, mode="error"), pytest.raises(devguard.StrayDeviceError, match="holds that device as a constant"):
            load()
        assert [row[2] for row in found()] == ["warned", "refused"]

    def test_off_unguarded_allowed_and_uninstall_record_nothing(self, make, tmp_path):
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

    def test_the_cpu_owner_refuses_a_baked_gpu_in_mode_error(self, make, tmp_path):
        load = make("cuda:1", tmp_path / "x.pt2")
        with guard("cpu", mode="error"), pytest.raises(devguard.StrayDeviceError, match="owns cpu"):
            load()


@pytest.mark.parametrize("make", [traced, scripted])
def test_map_location_does_not_change_the_constants(make, tmp_path):
    load = make("cuda:0", tmp_path / "x.pt")
    with guard(1):
        load(map_location="cuda:1")
    assert found() == [("artefacts", "cuda:0", "observed")]


def test_a_bare_cuda_means_the_current_device_and_is_no_stray(tmp_path):
    class Bare(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.zeros(4, device="cuda").to(x.device)

    torch.jit.script(Bare()).save(str(tmp_path / "x.pt"))
    with guard(1, mode="error"):
        torch.jit.load(str(tmp_path / "x.pt"))
    assert found() == []


class Weighted(torch.nn.Module):
    """Weights, a buffer, a constant and a graph, all on one device."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.weight = torch.nn.Parameter(torch.arange(4.0).to(device))
        self.register_buffer("scale", torch.arange(4.0).to(device), persistent=False)
        self.register_buffer("shift", torch.arange(4.0).to(device))
        self.more = torch.arange(2.0).to(device)

    def forward(self, x: torch.Tensor) -> Any:
        made = torch.zeros(4, device=self.device), x.to(self.device), torch.ops.aten.full([2], 1.0, device=self.device)
        return x + self.weight, self.scale + self.shift, self.more + 1, made


class Mixed(Weighted):
    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x), torch.zeros(4, device="cuda:1")


def devices_in(program: Any) -> set[str]:
    """Return every device that a loaded program names or lies on."""
    named = {tag for tag, _, _ in artefacts._constants_of_export(program)}
    for node in program.graph.nodes:
        value = node.meta.get("val")
        fakes = value if isinstance(value, (tuple, list)) else [value]
        named |= {str(fake.device) for fake in fakes if fake is not None}
    for tensor in (*program.state_dict.values(), *program.constants.values(), *program.example_inputs[0]):
        named.add(str(tensor.device))
    return named


@pytest.fixture
def program(request, tmp_path) -> Any:
    path = tmp_path / "x.pt2"
    model: torch.nn.Module = request.param("cuda:0")
    torch.export.save(torch.export.export(model, (torch.zeros(4).to("cuda:0"),)), path)
    return path


class TestExportedPrograms:
    @pytest.mark.parametrize("program", [Weighted], indirect=True)
    def test_a_whole_program_is_read_onto_the_owner(self, program):
        assert devices_in(torch.export.load(program)) == {"cuda:0"}  # unguarded
        with guard(2):
            loaded = torch.export.load(program)
        assert devices_in(loaded) == {"cuda:2"}
        assert isinstance(loaded.state_dict["weight"], torch.nn.Parameter)
        assert loaded.state_dict["weight"].tolist() == [0.0, 1.0, 2.0, 3.0]
        assert ("artefacts", "cuda:0", "repaired") in found()
        assert {stray.site.file for stray in journal.strays()} == {__file__}
        made = loaded.module()(torch.zeros(4).to("cuda:2"))[3]
        assert {str(tensor.device) for tensor in made} == {"cuda:2"}

    @pytest.mark.parametrize("program", [Weighted], indirect=True)
    @pytest.mark.parametrize("mode", ["repair", "error"])
    def test_reading_opens_no_context_on_another_device(self, program, mode):
        code = (
            "import torch.export\n"
            f"with devguard.guard(2, mode={mode!r}):\n"
            "    try: torch.export.load(sys.argv[1])\n"
            "    except devguard.StrayDeviceError as error: print(error)\n"
            "    print(ctx())"
        )
        *refusal, contexts = run_child(code, arguments=[str(program)]).splitlines()
        assert contexts == "[2]"
        assert bool(refusal) == (mode == "error")

    @pytest.mark.parametrize("program", [Weighted], indirect=True)
    def test_a_buffer_is_read_too_and_other_threads_are_not_affected(self, program):
        with guard(3):
            place = sys.modules[artefacts.READERS[0]].deserialize_device
            artefacts._thread.reading = artefacts._Reading(owner_of_index(3), refuse=False)
            with ThreadPoolExecutor(1) as pool:
                elsewhere = pool.submit(place, SimpleNamespace(type="cuda", index=0)).result()
            here = place(SimpleNamespace(type="cuda", index=0))
            artefacts._thread.reading = None
            assert (str(elsewhere), str(here)) == ("cuda:0", "cuda:3")
            assert devices_in(torch.export.load(io.BytesIO(program.read_bytes()))) == {"cuda:3"}

    @pytest.mark.parametrize("program", [Mixed], indirect=True)
    @pytest.mark.parametrize("owner", [1, 2])
    def test_a_program_that_names_several_gpus_is_left_and_recorded(self, program, owner):
        with guard(owner, doors={"load": "off"}):
            loaded = torch.export.load(io.BytesIO(program.read_bytes()))
        assert devices_in(loaded) == {"cuda:0", "cuda:1"}
        source = "cuda:0" if owner == 1 else "cuda:0,cuda:1"
        assert [row for row in found() if row[0] == "artefacts"] == [("artefacts", source, "observed")]
        with guard(owner, mode="error"), pytest.raises(devguard.StrayDeviceError, match="holds that device"):
            torch.export.load(program)

    @pytest.mark.parametrize("program", [Weighted], indirect=True)
    @pytest.mark.parametrize("mode", ["repair", "error"])
    def test_a_program_on_an_allowed_device_stays_there(self, program, mode):
        devguard.allow("cuda:0")
        with guard(1, mode=mode):
            assert devices_in(torch.export.load(program)) >= {"cuda:0"}
        assert [row for row in found() if row[0] == "artefacts"] == []

    @pytest.mark.parametrize("program", [Weighted], indirect=True)
    def test_the_cpu_owner_leaves_and_records_a_program_on_a_gpu(self, program):
        with guard("cpu", doors={"load": "off"}):
            assert devices_in(torch.export.load(program)) == {"cuda:0"}
        assert ("artefacts", "cuda:0", "observed") in found()

    @pytest.mark.parametrize("program", [Weighted], indirect=True)
    @pytest.mark.parametrize("load", ["off", "repair", "error"])
    def test_the_cpu_owner_refuses_in_mode_error_before_a_byte_is_on_the_gpu(self, program, load):
        before = torch.cuda.memory_stats(0).get("allocation.all.allocated", 0)
        with guard("cpu", doors={"artefacts": "error", "load": load}), pytest.raises(devguard.StrayDeviceError):
            torch.export.load(program)
        assert torch.cuda.memory_stats(0).get("allocation.all.allocated", 0) == before
        assert ("artefacts", "cuda:0", "refused") in found()

    def test_torchs_own_errors_are_raised(self, tmp_path):
        with guard(1), pytest.raises((OSError, RuntimeError, ValueError)):
            torch.export.load(tmp_path / "nothing.pt2")
        assert artefacts._thread.reading is None

    def test_uninstall_restores_the_reader_in_both_modules(self, tmp_path):
        torch.export.load(io.BytesIO(_bytes_of("cpu", tmp_path)))  # imports the modules of the reader
        modules = [sys.modules[name] for name in artefacts.READERS if hasattr(sys.modules.get(name), artefacts.READER)]
        before = [getattr(module, artefacts.READER) for module in modules]
        with guard(1):
            assert all(getattr(module, artefacts.READER) not in before for module in modules)
        assert devguard.uninstall() == []
        assert [getattr(module, artefacts.READER) for module in modules] == before

    def test_uninstall_restores_a_copy_of_the_replaced_reader(self):
        import torch._export.serde.serialize as serialize

        original = serialize.deserialize_device
        with guard(1):
            late = ModuleType("torch.export.pt2_archive._package")
            late.deserialize_device = serialize.deserialize_device  # type: ignore[attr-defined]
            artefacts._patch_reader(late)
        assert devguard.uninstall() == []
        assert late.deserialize_device is serialize.deserialize_device is original  # type: ignore[attr-defined]

    def test_a_torch_without_the_reader_is_a_problem_in_the_status(self):
        with guard(1):
            artefacts._patch_reader(ModuleType("torch._export.serde.serialize"))
            assert "deserialize_device" in devguard.status()["doors"]["artefacts"]["problem"]


def _bytes_of(device: str, folder: Path) -> bytes:
    exported(device, folder / "some.pt2")
    return (folder / "some.pt2").read_bytes()


def test_a_program_of_unknown_structure_is_counted_and_skipped():
    with guard(1):
        artefacts._judge_constants(artefacts._constants_of_export(object()), owner_of_index(1))
        assert devguard.status()["doors"]["artefacts"]["unread_programs"] == 1
    assert found() == []


def test_a_torch_without_export_load_is_a_problem_in_the_status():
    with guard(1):
        artefacts._patch_export(ModuleType("torch.export"))
        assert "torch.export.load" in devguard.status()["doors"]["artefacts"]["problem"]
