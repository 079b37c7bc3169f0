"""The door ``jit`` on a CPU build, with rewritten tags in the archives."""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

import devguard
from devguard import StrayDeviceError, StrayDeviceWarning
from devguard.doors.arrivals import jit
from tests.helpers.fakecuda import FakeCuda

pytestmark = [pytest.mark.usefixtures("clean"), pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")]


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.arange(3.0))
        self.register_buffer("count", torch.ones(2, dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight + torch.tensor([5.0])


@pytest.fixture(scope="module")
def archive() -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(Model()), buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def frozen() -> bytes:
    """An archive in which the tensors are constants."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.freeze(torch.jit.script(Model()).eval()), buffer)
    return buffer.getvalue()


WEIGHT, COUNT = 12, 16  # bytes


def rewritten(data: bytes, tags: list[str]) -> bytes:
    """Return a pickle of TorchScript with one device after the other replaced; the last tag is repeated.

    The pickler of TorchScript writes the text of a device once and refers to it afterwards.
    """
    steps = list(pickletools.genops(data))
    ends = [position for _, _, position in steps[1:]] + [len(data)]
    written = b""
    memo = None
    last = None
    for (opcode, argument, position), end in zip(steps, ends, strict=True):
        piece = data[position:end]
        if opcode.name in ("BINPUT", "LONG_BINPUT") and last == "cpu":
            memo = argument
        if argument == "cpu" or (opcode.name in ("BINGET", "LONG_BINGET") and argument == memo):
            text = (tags.pop(0) if len(tags) > 1 else tags[0]).encode()
            piece = b"X" + struct.pack("<i", len(text)) + text
        written += piece
        last = argument
    return written


def retagged(archive: bytes, *tags: str, names: tuple[str, ...] = ("data.pkl", "constants.pkl")) -> bytes:
    """Return the archive with the tag of one storage after the other replaced; the last tag is repeated."""
    waiting = list(tags)
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as source, zipfile.ZipFile(result, "w") as target:
        for info in source.infolist():
            data = source.read(info)
            if info.filename.rpartition("/")[2] in names:
                data = rewritten(data, waiting)
            target.writestr(info.filename, data)
    return result.getvalue()


def load(data: bytes, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit", category=DeprecationWarning)
        return torch.jit.load(io.BytesIO(data), **options)


def check(model: Any) -> None:
    assert model.weight.tolist() == [0, 1, 2]
    assert model.count.tolist() == [1, 1]
    assert model(torch.ones(3)).tolist() == [5, 6, 7]
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


def test_the_rewritten_archive_is_read_by_torch(archive: bytes) -> None:
    check(load(retagged(archive, "cpu")))
    check(load(retagged(archive, "cuda:3"), map_location="cpu"))


def test_an_archive_of_a_gpu_fails_while_the_door_is_closed_and_is_repaired_when_it_is_open(archive: bytes) -> None:
    data = retagged(archive, "cuda:3")
    with pytest.raises(RuntimeError):
        load(data)
    with devguard.guard("cpu"):
        check(load(data))
    (stray,) = devguard.strays()
    assert (stray.door, stray.source, stray.target, stray.action) == ("jit", "cuda:3", "cpu", "repaired")
    assert stray.bytes >= WEIGHT + COUNT
    assert stray.site is not None
    assert stray.site.file == __file__


@pytest.mark.parametrize("how", ["path", "string", "stream", "open file", "stream that cannot seek back"])
def test_every_way_to_name_the_archive(archive: bytes, how: str, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(retagged(archive, "cuda:3"))

    class Stream(io.BytesIO):
        def seek(self, *position: int) -> int:
            raise io.UnsupportedOperation("seek")

    with devguard.guard("cpu"):
        if how == "path":
            model = torch.jit.load(path)
        elif how == "string":
            model = torch.jit.load(str(path))
        elif how == "stream":
            model = torch.jit.load(io.BytesIO(path.read_bytes()))
        elif how == "open file":
            with path.open("rb") as file:
                model = torch.jit.load(file)
        else:
            model = torch.jit.load(Stream(path.read_bytes()))
    check(model)
    assert len(devguard.strays()) == 1


def test_a_stream_is_read_from_where_it_stands(archive: bytes) -> None:
    stream = io.BytesIO(b"header" + retagged(archive, "cuda:3"))
    stream.seek(6)
    with devguard.guard("cpu"):
        check(torch.jit.load(stream))


def test_an_archive_of_the_cpu_is_left_alone(archive: bytes, cuda: FakeCuda) -> None:
    for owner in ("cpu", "cuda:1"):
        with devguard.guard(owner, mode="error"):
            check(load(archive))
    assert devguard.strays() == ()


def test_an_archive_that_mixes_devices_is_repaired_for_the_cpu(archive: bytes) -> None:
    with devguard.guard("cpu"):
        check(load(retagged(archive, "cuda:3", "cpu")))
    assert [(stray.source, stray.action) for stray in devguard.strays()] == [("cuda:3", "repaired")]


def test_an_archive_that_mixes_devices_is_observed_and_left_alone_for_a_gpu(archive: bytes, cuda: FakeCuda) -> None:
    """A map_location would move the CPU tensors as well."""
    data = retagged(archive, "cuda:3", "cpu")
    with pytest.raises(RuntimeError) as expected:
        load(data)
    with devguard.guard("cuda:1"), pytest.raises(RuntimeError) as caught:
        load(data)
    assert type(caught.value) is type(expected.value), caught.value
    assert [(stray.source, stray.target, stray.action) for stray in devguard.strays()] == [
        ("cuda:3", "cuda:3", "observed")
    ]


def test_several_devices_are_named_together(archive: bytes) -> None:
    with devguard.guard("cpu"):
        check(load(retagged(archive, "cuda:3", "cuda:1")))
    assert [stray.source for stray in devguard.strays()] == ["cuda:1,cuda:3"]


def test_an_explicit_map_location_wins(archive: bytes) -> None:
    with devguard.guard("cpu", mode="error"):
        check(load(retagged(archive, "cuda:3"), map_location="cpu"))
        check(load(retagged(archive, "cuda:3"), map_location=torch.device("cpu")))
    assert devguard.strays() == ()


def test_mode_error_refuses_before_torch_reads_the_archive(archive: bytes) -> None:
    with devguard.guard("cpu", mode="error"), pytest.raises(StrayDeviceError, match=r"jit:.*cuda:3.*map_location"):
        load(retagged(archive, "cuda:3"))


def test_modes_observe_and_off_leave_the_archive_to_torch(archive: bytes) -> None:
    data = retagged(archive, "cuda:3")
    for mode, actions in (("off", []), ("observe", ["observed"])):
        with devguard.guard("cpu", mode=mode), pytest.raises(RuntimeError):  # type: ignore[arg-type]
            load(data)
        assert [stray.action for stray in devguard.strays()] == actions


def test_mode_warn_warns_at_the_users_line(archive: bytes) -> None:
    with (
        devguard.guard("cpu", mode="warn"),
        pytest.warns(StrayDeviceWarning, match="cuda:3") as caught,
        pytest.raises(RuntimeError),
    ):
        load(retagged(archive, "cuda:3"))
    assert caught[0].filename == __file__


def test_extra_files_and_other_arguments_pass_through(archive: bytes) -> None:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(Model()), buffer, _extra_files={"note.txt": "hello"})
    files = {"note.txt": ""}
    with devguard.guard("cpu"):
        check(load(retagged(buffer.getvalue(), "cuda:3"), _extra_files=files))
    assert files["note.txt"] in ("hello", b"hello")


def test_torchs_own_errors_are_raised(tmp_path: Path) -> None:
    for bad in (tmp_path / "missing.pt", str(tmp_path)):
        with pytest.raises((ValueError, RuntimeError)) as expected:
            torch.jit.load(bad)
        with devguard.guard("cpu"), pytest.raises(expected.type) as caught:
            torch.jit.load(bad)
        assert str(caught.value) == str(expected.value)
    with devguard.guard("cpu"), pytest.raises(RuntimeError):
        torch.jit.load(io.BytesIO(b"not an archive"))


# --- reading the tags ---


def test_the_tags_of_a_real_archive_are_all_cpu(archive: bytes) -> None:
    tags = jit._read_tags(io.BytesIO(archive))
    assert set(tags) == {"cpu"}
    assert tags["cpu"] >= WEIGHT + COUNT


def test_the_bytes_of_each_tag_are_counted(archive: bytes) -> None:
    assert jit._read_tags(io.BytesIO(retagged(archive, "cuda:3", "cuda:1"))) in (
        {"cuda:3": WEIGHT, "cuda:1": COUNT},
        {"cuda:3": COUNT, "cuda:1": WEIGHT},
    )
    mixed = jit._read_tags(io.BytesIO(retagged(archive, "cuda:3", "cpu")))
    assert set(mixed) == {"cuda:3", "cpu"}


def test_the_tags_of_constants_are_read_as_well(frozen: bytes) -> None:
    assert set(jit._read_tags(io.BytesIO(frozen))) == {"cpu"}
    assert jit._read_tags(io.BytesIO(retagged(frozen, "cuda:3"))) == {"cuda:3": WEIGHT + 4}  # and the 5.0 of forward


def test_an_archive_of_constants_is_repaired(frozen: bytes) -> None:
    data = retagged(frozen, "cuda:3")
    with pytest.raises(RuntimeError):
        load(data)
    with devguard.guard("cpu"):
        assert load(data)(torch.ones(3)).tolist() == [5, 6, 7]
    assert [(stray.source, stray.bytes) for stray in devguard.strays()] == [("cuda:3", WEIGHT + 4)]


def test_reading_the_tags_leaves_the_stream_where_it_was(archive: bytes) -> None:
    stream = io.BytesIO(archive)
    jit._read_tags(stream)
    assert stream.tell() == 0


def test_reading_the_tags_runs_no_code_of_the_archive(tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> Any:
            return exec, (f"open({str(marker)!r}, 'w')",)

    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("model/data.pkl", pickle.dumps([Evil()]))
    assert jit._read_tags(data) == {}
    assert not marker.exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"garbage", b"\x80\x02.", pickle.dumps(1)[:-1], b"\x80\x02(X\x01\x00\x00\x00aQ.", b"\x80\x02K\x01Q."],
    ids=repr,
)
def test_an_archive_that_cannot_be_parsed_is_counted_and_left_to_torch(content: bytes) -> None:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("model/data.pkl", content)
    before = jit.status()["unread_archives"]
    assert jit._read_tags(io.BytesIO(data.getvalue())) == {}
    assert jit.status()["unread_archives"] == before + 1


def test_a_pickle_without_storages_has_no_tags() -> None:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("model/data.pkl", pickle.dumps({"a": 1}))
    assert jit._read_tags(data) == {}
