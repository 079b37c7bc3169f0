"""The door ``jit`` on real devices: archives of TorchScript loaded without a ``map_location``."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch

import devguard
from devguard import guard

pytestmark = pytest.mark.filterwarnings(r"ignore:`torch\.jit\.")  # deprecated, and still what checkpoints are made of


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
    def test_unguarded_it_lands_where_the_archive_says(self, load):
        model = load(Model())
        torch.cuda.set_device(1)
        assert model().weight.device.index == 0

    def test_is_repaired(self, load):
        read = load(Model())
        with guard(1):
            model = read()
        assert model.weight.device == model.table.device == torch.device("cuda:1")
        assert model.weight.tolist() == [0, 1, 2, 3]
        (stray,) = devguard.strays()
        assert (stray.door, stray.source, stray.target, stray.action) == ("jit", "cuda:0", "cuda:1", "repaired")
        assert stray.bytes == 4 * 4 + 3 * 8
        assert stray.site.file == __file__

    def test_an_archive_with_host_tensors_is_only_detected(self, load):
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

    def test_error_refuses(self, load):
        read = load(Model())
        with guard(1, mode="error"), pytest.raises(devguard.StrayDeviceError, match=r"torch\.jit\.load"):
            read()

    def test_on_its_owner_it_is_no_stray(self, load):
        read = load(Model())
        with guard(0, mode="error"):
            assert read().weight.device.index == 0
        assert devguard.strays() == ()


def test_torchs_own_error_for_what_is_no_archive(tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes(b"nothing")
    with guard(1), pytest.raises(RuntimeError, match=r"PytorchStreamReader"):
        torch.jit.load(str(path))
