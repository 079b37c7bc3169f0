"""The door ``jit`` on simulated GPUs: archives of TorchScript loaded without a ``map_location``."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch

import devguard
from devguard import guard

pytestmark = pytest.mark.filterwarnings(r"ignore:`torch\.jit\.")  # deprecated, but many checkpoints are archives


class Model(torch.nn.Module):
    def __init__(self, *, mixed: bool = False) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.arange(4.0).to("cuda:0"))
        self.register_buffer("table", torch.arange(3) if mixed else torch.arange(3).to("cuda:0"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.weight


@pytest.fixture(params=["path", "buffer", "torch.load"])
def load(request, tmp_path):
    """Save a model and return a function that loads it in one of the three ways."""

    def save(model):
        path = Path(tmp_path, "model.pt")
        torch.jit.script(model).save(str(path))
        if request.param == "torch.load":
            return lambda **options: torch.load(path, weights_only=False, **options)
        if request.param == "buffer":
            return lambda **options: torch.jit.load(io.BytesIO(path.read_bytes()), **options)
        return lambda **options: torch.jit.load(str(path), **options)

    return save


@pytest.mark.filterwarnings("ignore:'torch.load' received a zip file:UserWarning")
class TestLoad:
    def test_unguarded_the_model_lands_on_the_device_in_the_archive(self, load):
        model = load(Model())
        torch.cuda.set_device(1)
        assert model().weight.device.index == 0

    def test_guarded_the_model_lands_on_the_owner(self, load):
        read = load(Model())
        with guard(1):
            model = read()
        assert model.weight.device == model.table.device == torch.device("cuda:1")
        assert model.weight.tolist() == [0, 1, 2, 3]
        (stray,) = devguard.strays()
        assert (stray.door, stray.source, stray.target, stray.action) == ("jit", "cuda:0", "cuda:1", "repaired")
        assert stray.bytes == 4 * 4 + 3 * 8
        assert stray.site.file == __file__

    def test_an_archive_with_host_tensors_is_only_recorded(self, load):
        read = load(Model(mixed=True))
        with guard(1):
            model = read()
        assert (model.weight.device.index, model.table.device.type) == (0, "cpu")
        assert [stray.action for stray in devguard.strays()] == ["observed"]

    def test_the_cpu_owner_gets_host_tensors(self, load):
        read = load(Model(mixed=True))
        with guard("cpu"):
            assert read().weight.device.type == "cpu"

    def test_an_explicit_map_location_wins(self, load):
        read = load(Model())
        with guard(1):
            assert read(map_location="cuda:2").weight.device.index == 2
        (stray,) = devguard.strays()
        assert (stray.door, stray.source, stray.action, stray.bytes) == ("jit", "cuda:2", "kept", 4 * 4 + 3 * 8)

    @pytest.mark.parametrize("location", ["cuda:2", torch.device("cuda:2")], ids=["string", "device"])
    def test_error_mode_refuses_an_explicit_map_location_before_a_byte_is_there(self, load, location):
        read = load(Model())
        before = torch.cuda.memory_stats(2).get("allocation.all.allocated", 0)
        with guard(1, mode="error"), pytest.raises(devguard.StrayDeviceError, match="names that device itself"):
            read(map_location=location)
        assert torch.cuda.memory_stats(2).get("allocation.all.allocated", 0) == before

    @pytest.mark.parametrize("location", ["cuda:1", torch.device("cuda:1"), "cuda", "cpu"], ids=str)
    def test_a_map_location_on_the_owner_or_the_host_is_no_stray(self, load, location):
        read = load(Model())
        with guard(1, mode="error"):
            assert read(map_location=location).weight.device in (torch.device("cuda:1"), torch.device("cpu"))
        assert devguard.strays() == ()

    def test_without_an_index_the_device_that_the_program_made_current_is_obeyed(self, load):
        read = load(Model())
        with guard(1), torch.cuda.device(2):
            assert read(map_location="cuda").weight.device.index == 2
        assert [(stray.source, stray.action) for stray in devguard.strays()] == [("cuda:2", "kept")]

    def test_off_allowed_and_unguarded_leave_no_record(self, load):
        read = load(Model())
        with guard(1, mode="off"):
            read(map_location="cuda:2")
        with guard(1), devguard.unguarded():
            read(map_location="cuda:2")
        with guard(1, mode="error"):
            devguard.allow("cuda:2")
            assert read(map_location="cuda:2").weight.device.index == 2
        assert devguard.strays() == ()

    def test_error_mode_refuses(self, load):
        read = load(Model())
        with guard(1, mode="error"), pytest.raises(devguard.StrayDeviceError, match=r"torch\.jit\.load"):
            read()

    def test_an_archive_of_the_owners_device_is_no_stray(self, load):
        read = load(Model())
        with guard(0, mode="error"):
            assert read().weight.device.index == 0
        assert devguard.strays() == ()


def test_a_file_that_is_no_archive_raises_torchs_own_error(tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes(b"nothing")
    with guard(1), pytest.raises(RuntimeError, match=r"PytorchStreamReader"):
        torch.jit.load(str(path))
