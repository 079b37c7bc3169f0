"""The door ``load`` on a CPU build: data with the tag of a GPU is loaded whole, and on the owner.

Every payload here carries ``cuda:3`` (tests/helpers/tagging.py). A build without CUDA refuses that tag, so each of
these loads fails while the door is closed; under ``guard("cpu")`` it must equal the same load of the same tensors
without a tag.
"""

from __future__ import annotations

import copy
import io
import pickle
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import dill
import joblib
import pytest
import torch
import zmq
from torch.package import PackageExporter, PackageImporter
from torch.testing._internal.two_tensor import TwoTensor

import devguard
from devguard import StrayDeviceError
from tests.helpers import tagging, tensors

pytestmark = [
    pytest.mark.usefixtures("clean"),
    # torch.package warns once in a process: in the test that happens to be the first.
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
]

TAG = "cuda:3"


def _special(name: str) -> Any:
    return tensors.SPECIAL[name]("cpu")


def _quantized(channels: bool) -> torch.Tensor:
    data = torch.arange(6.0).reshape(2, 3)
    if channels:
        return torch.quantize_per_channel(data, torch.tensor([0.5, 0.25]), torch.tensor([0, 1]), 0, torch.qint8)
    return torch.quantize_per_tensor(data, 0.5, 3, torch.quint8)


def _jagged() -> torch.Tensor:
    return torch.nested.nested_tensor([torch.arange(2.0), torch.arange(3.0)], layout=torch.jagged)


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 2)
        self.tied = self.linear.weight
        self.register_buffer("running", torch.arange(4))
        self.register_buffer("passing", torch.ones(1), persistent=False)


SPECIALS: dict[str, Callable[[], Any]] = {name: (lambda name=name: _special(name)) for name in tensors.SPECIAL} | {
    "bsc": lambda: tensors._sparse(torch.sparse_bsc)("cpu"),
    "quantized per tensor": lambda: _quantized(False),
    "quantized per channel": lambda: _quantized(True),
    "jagged": _jagged,
    "uncoalesced": lambda: torch.sparse_coo_tensor([[0, 0], [1, 1]], [1.0, 2.0], (2, 3)),
    "complex half": lambda: torch.tensor([1 + 2j], dtype=torch.complex32),
    "uint16": lambda: torch.tensor([65535], dtype=torch.uint16),
    "attributes": lambda: _with_attributes(),
    "state_dict": lambda: Model().state_dict(),
    "module": Model,
    "optimizer": lambda: _optimizer().state_dict(),
    "storage": lambda: torch.arange(3.0).untyped_storage(),
    "typed storage": lambda: _typed_storage(),
    "ordered": lambda: OrderedDict(a=torch.ones(2), b=(torch.zeros(1), [torch.ones(())])),
}
if hasattr(torch.Tensor, "refine_names"):  # gone in torch 2.13
    SPECIALS["named"] = lambda: torch.arange(6.0).reshape(2, 3).refine_names("rows", "columns")


def _with_attributes() -> torch.Tensor:
    tensor = torch.arange(3.0)
    tensor.origin = "camera"  # type: ignore[attr-defined]
    return tensor


def _typed_storage() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.arange(3.0).storage()


def _optimizer() -> torch.optim.Optimizer:
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([parameter])
    parameter.grad = torch.ones(2)
    optimizer.step()
    return optimizer


def contents(value: Any) -> Any:
    """Return everything that a load must preserve, for each of `SPECIALS`."""
    if isinstance(value, torch.nn.Module):
        state = {**dict(value.named_parameters(remove_duplicate=False)), **dict(value.named_buffers())}
        return type(value), value.linear.weight is value.tied, tensors.describe(state)
    if isinstance(value, torch.UntypedStorage):
        return value.device, value.tolist()
    if isinstance(value, torch.TypedStorage):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return value.dtype, value._untyped_storage.device, value.tolist()
    if isinstance(value, torch.Tensor):
        extra: Any = vars(value).get("origin")
        if value.layout is torch.jagged:
            return [part.tolist() for part in value.unbind()], value.device, value.offsets().device
        if value.is_quantized and value.qscheme() is torch.per_channel_affine:
            extra = value.q_per_channel_scales().tolist(), value.q_per_channel_zero_points().tolist()
        if value.is_sparse:
            extra = value.is_coalesced()
        return extra, tensors.describe(value)
    return type(value), tensors.describe(value)


def read_plain(data: bytes) -> Any:
    return pickle.loads(data)


def read_python(data: bytes) -> Any:
    return pickle._loads(data)


def read_zip(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=False)


def same_load(name: str, write: Callable[[Any, str], bytes], read: Callable[[bytes], Any]) -> None:
    """Check that the tagged load fails unguarded, and that guarded it equals the untagged one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from torch, about quantized, sparse and nested tensors
        value = SPECIALS[name]()
        plain, marked = write(value, "cpu"), write(value, TAG)
        expected = contents(read(plain))
        with pytest.raises(RuntimeError, match=tagging.REFUSAL):
            read(marked)
        with devguard.guard("cpu"):
            assert contents(read(marked)) == expected
            assert contents(read(plain)) == expected
    assert {stray.source for stray in devguard.strays()} == {TAG}
    assert {stray.action for stray in devguard.strays()} == {"repaired"}


# torch 2.13 itself cannot read these from a plain pickle or a legacy file, because their storage has no typed class.
NOT_PLAIN = {"uint16", "complex half", "storage"}
# A legacy file fills the storages last, and the sizes of a nested tensor are needed earlier.
NOT_LEGACY = NOT_PLAIN | {"nested"}


@pytest.mark.parametrize("name", sorted(set(SPECIALS) - NOT_PLAIN))
def test_every_kind_of_tensor_is_loaded_whole_from_a_pickle(name: str) -> None:
    same_load(name, tagging.dumps, read_plain)


@pytest.mark.parametrize("name", sorted(SPECIALS))
def test_every_kind_of_tensor_is_loaded_whole_from_a_file(name: str) -> None:
    same_load(name, lambda value, tag: tagging.save(value, tag, outer=True), read_zip)


@pytest.mark.parametrize("name", sorted(set(SPECIALS) - NOT_LEGACY))
def test_every_kind_of_tensor_is_loaded_whole_from_a_legacy_file(name: str) -> None:
    same_load(name, lambda value, tag: tagging.save(value, tag, legacy=True, outer=True), read_zip)


# --- every way to unpickle ---


class Subclassed(pickle.Unpickler):
    """An unpickler that a program defines, for example for an allow-list."""

    def find_class(self, module: str, name: str) -> Any:
        assert not module.startswith("os")
        return super().find_class(module, name)


class SubclassedInPython(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return super().find_class(module, name)


def _through_cloudpickle(value: Any, folder: Path) -> Any:
    return cloudpickle.loads, cloudpickle.dumps(value)


def _through_dill(value: Any, folder: Path) -> Any:
    return dill.loads, dill.dumps(value)


def _through_joblib(value: Any, folder: Path) -> Any:
    joblib.dump(value, folder / "joblib")
    return joblib.load, folder / "joblib"


def _through_compressed_joblib(value: Any, folder: Path) -> Any:
    joblib.dump(value, folder / "joblib.gz", compress=3)
    return joblib.load, folder / "joblib.gz"


def _through_a_file_of_pickle(value: Any, folder: Path) -> Any:
    (folder / "pickle").write_bytes(pickle.dumps(value))

    def load(path: Path) -> Any:
        with path.open("rb") as file:
            return pickle.load(file)

    return load, folder / "pickle"


def _through_zmq(value: Any, folder: Path) -> Any:
    context = zmq.Context()
    sender, receiver = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    sender.bind("inproc://values")
    receiver.connect("inproc://values")
    sender.send_pyobj(value)

    def load(_: None) -> Any:
        try:
            return receiver.recv_pyobj()
        finally:
            sender.close()
            receiver.close()
            context.term()

    return load, None


def _through_torch_package(value: Any, folder: Path) -> Any:
    with PackageExporter(folder / "package.pt") as exporter:
        exporter.save_pickle("data", "value.pkl", value)
    return lambda path: PackageImporter(path).load_pickle("data", "value.pkl"), folder / "package.pt"


def _through_a_set_state(value: Any, folder: Path) -> Any:
    return lambda data: pickle.loads(data).value, pickle.dumps(tagging.Nested(pickle.dumps(value)))


def _through_torch_load_with_dill(value: Any, folder: Path) -> Any:
    torch.save(value, folder / "dill.pt", pickle_module=dill)
    return lambda path: torch.load(path, pickle_module=dill, weights_only=False), folder / "dill.pt"


def _pickled(load: Callable[[bytes], Any]) -> Callable[[Any, Path], Any]:
    return lambda value, folder: (load, pickle.dumps(value))


def _saved(legacy: bool = False, **options: Any) -> Callable[[Any, Path], Any]:
    def through(value: Any, folder: Path) -> Any:
        torch.save(value, folder / "file.pt", _use_new_zipfile_serialization=not legacy)
        return lambda path: torch.load(path, **options), folder / "file.pt"

    return through


def _saved_to_buffer(legacy: bool = False, **options: Any) -> Callable[[Any, Path], Any]:
    def through(value: Any, folder: Path) -> Any:
        buffer = io.BytesIO()
        torch.save(value, buffer, _use_new_zipfile_serialization=not legacy)
        return lambda data: torch.load(io.BytesIO(data), **options), buffer.getvalue()

    return through


WAYS: dict[str, Callable[[Any, Path], Any]] = {
    "pickle.loads": _pickled(pickle.loads),
    "pickle.load": _through_a_file_of_pickle,
    "pickle._loads": _pickled(pickle._loads),
    "pickle.Unpickler": _pickled(lambda data: pickle.Unpickler(io.BytesIO(data)).load()),
    "a subclass of Unpickler": _pickled(lambda data: Subclassed(io.BytesIO(data)).load()),
    "a subclass of the Unpickler in Python": _pickled(lambda data: SubclassedInPython(io.BytesIO(data)).load()),
    "__setstate__": _through_a_set_state,
    "cloudpickle": _through_cloudpickle,
    "dill": _through_dill,
    "joblib": _through_joblib,
    "compressed joblib": _through_compressed_joblib,
    "zmq recv_pyobj": _through_zmq,
    "torch.package": _through_torch_package,
    "copy.deepcopy of a pickle": _pickled(lambda data: copy.deepcopy(pickle.loads(data))),
    "torch.load file": _saved(),
    "torch.load file, weights_only": _saved(weights_only=True),
    "torch.load file, all": _saved(weights_only=False),
    "torch.load mmap": _saved(mmap=True),
    "torch.load mmap, all": _saved(mmap=True, weights_only=False),
    "torch.load buffer": _saved_to_buffer(),
    "torch.load buffer, all": _saved_to_buffer(weights_only=False),
    "torch.load legacy": _saved(legacy=True),
    "torch.load legacy, all": _saved(legacy=True, weights_only=False),
    "torch.load legacy buffer": _saved_to_buffer(legacy=True),
    "torch.load with dill": _through_torch_load_with_dill,
}


def _value() -> dict[str, Any]:
    base = torch.arange(6.0)
    return {"base": base, "view": base[2:4], "whole": torch.arange(3), "p": torch.nn.Parameter(torch.ones(2)), "n": 7}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_load_is_repaired_and_fails_while_the_door_is_closed(way: str, tmp_path: Path) -> None:
    load, data = WAYS[way](_value(), tmp_path)
    expected = tensors.describe(load(data))
    with tagging.tagged(TAG):
        load, data = WAYS[way](_value(), tmp_path)
    with pytest.raises(RuntimeError, match=tagging.REFUSAL):
        load(data)
    assert devguard.strays() == ()
    with tagging.tagged(TAG):
        load, data = WAYS[way](_value(), tmp_path)
    with devguard.guard("cpu"):
        value = load(data)
    assert tensors.describe(value) == expected
    # a plain pickle writes the storage once for each tensor that shares it
    assert sum(stray.bytes for stray in devguard.strays()) - 3 * 8 - 2 * 4 in (6 * 4, 2 * 6 * 4)
    assert {(s.door, s.source, s.target, s.action) for s in devguard.strays()} == {("load", TAG, "cpu", "repaired")}


@pytest.mark.parametrize("way", WAYS)
def test_data_from_the_cpu_is_left_alone_and_is_no_stray(way: str, tmp_path: Path) -> None:
    load, data = WAYS[way](_value(), tmp_path)
    expected = tensors.describe(load(data))
    load, data = WAYS[way](_value(), tmp_path)
    with devguard.guard("cpu", mode="error"):
        assert tensors.describe(load(data)) == expected
    assert devguard.strays() == ()


@pytest.mark.parametrize("way", WAYS)
def test_mode_error_refuses_every_way_to_load(way: str, tmp_path: Path) -> None:
    with tagging.tagged(TAG):
        load, data = WAYS[way](_value(), tmp_path)
    with devguard.guard("cpu", mode="error"), pytest.raises(StrayDeviceError, match="cuda:3"):
        load(data)
    assert {stray.action for stray in devguard.strays()} == {"refused"}


@pytest.mark.parametrize("way", WAYS)
def test_a_load_without_an_owner_is_left_to_torch(way: str, tmp_path: Path) -> None:
    with devguard.guard("cpu"):
        pass  # the doors are open
    with tagging.tagged(TAG):
        load, data = WAYS[way](_value(), tmp_path)
    with devguard.unguarded(), pytest.raises(RuntimeError, match=tagging.REFUSAL):
        load(data)
    assert devguard.strays() == ()


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_aliases_inside_one_load_stay_aliases(legacy: bool) -> None:
    with devguard.guard("cpu"):
        value = torch.load(io.BytesIO(tagging.save(_value(), legacy=legacy)))
    value["base"][2] = 42
    assert value["view"].tolist() == [42, 3]


def test_an_index_that_does_not_exist_here_is_repaired_too() -> None:
    with devguard.guard("cpu"):
        assert pickle.loads(tagging.dumps(torch.ones(1), "cuda:77")).tolist() == [1]
        assert pickle.loads(tagging.dumps(torch.ones(1), "cuda")).tolist() == [1]
    assert [stray.source for stray in devguard.strays()] == ["cuda:77", "cuda"]


def test_a_pickle_without_tensors_is_not_touched() -> None:
    calls = []
    original = torch.serialization._get_restore_location
    data = pickle.dumps({"a": [1, 2.5, None, "x"], "b": b"bytes"})
    with devguard.guard("cpu", mode="error"):
        patched = torch.serialization._get_restore_location
        assert patched is not original
        torch.serialization._get_restore_location = lambda where: calls.append(where) or patched(where)
        try:
            assert pickle.loads(data) == {"a": [1, 2.5, None, "x"], "b": b"bytes"}
            assert calls == []
            pickle.loads(pickle.dumps(torch.ones(1)))
            assert calls == [None]
        finally:
            torch.serialization._get_restore_location = patched


def test_a_load_in_a_thread_without_a_scope_is_left_to_torch() -> None:
    data = tagging.dumps(torch.ones(1))
    results: list[Any] = []

    entered = threading.Event()

    def work() -> None:
        entered.wait()
        try:
            results.append(pickle.loads(data))
        except RuntimeError as error:
            results.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    with devguard.guard("cpu"):
        entered.set()
        thread.join()
    assert tagging.REFUSAL in str(results[0])


def test_weights_only_is_not_weakened() -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return print, ("owned",)

    buffer = io.BytesIO()
    torch.save([torch.ones(1), Evil()], buffer)
    buffer.seek(0)
    with devguard.guard("cpu"), pytest.raises(pickle.UnpicklingError, match=r"[Ww]eights"):
        torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("legacy", [False, True])
def test_the_outer_device_of_a_subclass_is_the_device_of_its_parts(legacy: bool) -> None:
    value = TwoTensor(torch.arange(2.0), torch.arange(2.0))
    data = tagging.save(value, legacy=legacy, outer=True)
    with tagging.landings():
        unguarded = torch.load(io.BytesIO(data), weights_only=False)
    assert str(unguarded.device) == TAG
    with devguard.guard("cpu"):
        repaired = torch.load(io.BytesIO(data), weights_only=False)
    assert tensors.devices(repaired) == {torch.device("cpu")}
    with tagging.landings() as landed, devguard.guard("cpu", mode="observe"):
        observed = torch.load(io.BytesIO(data), weights_only=False)
    assert str(observed.device) == TAG
    assert landed == [TAG, TAG]


# --- an explicit map_location wins ---


class Failing:
    """An object that cannot be loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _fail, ()


def _fail() -> None:
    raise ZeroDivisionError


def _load_that_raises(legacy: bool, **options: Any) -> None:
    data = tagging.save([torch.ones(1), Failing()], legacy=legacy)
    with tagging.landings(), devguard.unguarded(), pytest.raises(ZeroDivisionError):
        torch.load(io.BytesIO(data), weights_only=False, **options)


EXPLICIT: dict[str, Any] = {
    "a string": "cuda:5",
    "a device": torch.device("cuda:5"),
    "a dictionary": {"cuda:3": "cuda:5"},
    "a callable": lambda storage, location: torch.serialization.default_restore_location(storage, "cuda:5"),
}


@pytest.mark.parametrize("raised_before", [None, "cuda:6", "cpu", {"cuda:3": "cuda:6"}], ids=repr)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("how", EXPLICIT)
def test_an_explicit_map_location_is_obeyed_and_recorded(how: str, legacy: bool, raised_before: Any) -> None:
    data = tagging.save(torch.arange(3.0), legacy=legacy)
    with devguard.guard("cpu"):
        _load_that_raises(legacy, map_location=raised_before)
    with tagging.landings() as landed, devguard.guard("cpu"):
        value = torch.load(io.BytesIO(data), map_location=EXPLICIT[how], weights_only=False)
    assert value.tolist() == [0, 1, 2]
    assert landed == ["cuda:5"]
    kept = [(stray.action, stray.owner, stray.source, stray.target, stray.bytes) for stray in devguard.strays()]
    # only the result of a callable is visible, and in these tests it lies on the CPU
    assert kept == ([] if how == "a callable" else [("kept", "cpu", "cuda:5", "cuda:5", 12)])


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_dictionary_without_the_key_leaves_the_tag_in_charge(legacy: bool) -> None:
    data = tagging.save(torch.arange(3.0), legacy=legacy)
    with tagging.landings() as landed, devguard.guard("cpu"):
        torch.load(io.BytesIO(data), map_location={"cuda:0": "cpu"})
    assert landed == []
    assert [(stray.action, stray.source) for stray in devguard.strays()] == [("repaired", TAG)]


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    "where",
    ["cpu", torch.device("cpu"), {"cuda:3": "cpu"}, lambda storage, location: storage],
    ids=["string", "device", "dictionary", "callable"],
)
def test_an_explicit_map_location_to_the_owner_is_no_stray(where: Any, legacy: bool) -> None:
    data = tagging.save(torch.arange(3.0), legacy=legacy)
    with devguard.guard("cpu", mode="error"):
        assert torch.load(io.BytesIO(data), map_location=where).tolist() == [0, 1, 2]
    assert devguard.strays() == ()


def test_a_map_location_in_bytes_is_obeyed() -> None:
    data = tagging.save(torch.arange(3.0))
    with devguard.guard("cpu", mode="error"), pytest.raises(StrayDeviceError, match="cuda:5"):
        torch.load(io.BytesIO(data), map_location=b"cuda:5")  # type: ignore[arg-type]


def test_a_callable_that_returns_none_leaves_the_tag_in_charge() -> None:
    data = tagging.save(torch.arange(3.0))
    with tagging.landings() as landed, devguard.guard("cpu"):
        torch.load(io.BytesIO(data), map_location=lambda storage, location: None)
        with devguard.guard("cpu", mode="observe"):
            torch.load(io.BytesIO(data), map_location=lambda storage, location: None)
    assert landed == [TAG]
    assert [stray.action for stray in devguard.strays()] == ["repaired", "observed"]


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_an_explicit_map_location_away_from_the_owner_raises_in_mode_error_before_it_lands(legacy: bool) -> None:
    data = tagging.save(torch.arange(3.0), legacy=legacy)
    with (
        tagging.landings() as landed,
        devguard.guard("cpu", mode="error"),
        pytest.raises(StrayDeviceError, match=r"cuda:5.*owns cpu.*map_location"),
    ):
        torch.load(io.BytesIO(data), map_location="cuda:5")
    assert landed == []


@pytest.mark.parametrize("mode", ["off"])
def test_an_explicit_map_location_leaves_no_record_where_the_door_is_off(mode: Any) -> None:
    data = tagging.save(torch.arange(3.0))
    with tagging.landings() as landed, devguard.guard("cpu", mode=mode):
        torch.load(io.BytesIO(data), map_location="cuda:5")
    assert landed == ["cuda:5"]
    assert devguard.strays() == ()


def test_data_from_the_cpu_follows_an_explicit_map_location() -> None:
    buffer = io.BytesIO()
    torch.save(torch.arange(3.0), buffer)
    buffer.seek(0)
    with tagging.landings() as landed, devguard.guard("cpu"):
        torch.load(buffer, map_location="cuda:5")
    assert landed == ["cuda:5"]


@pytest.mark.parametrize("raises_first", [False, True])
@pytest.mark.parametrize("outer_legacy", [False, True], ids=["outer zip", "outer legacy"])
@pytest.mark.parametrize("inner", ["pickle", "zip", "legacy"])
@pytest.mark.parametrize("outer_where", [None, "cuda:5", {"cuda:9": "cpu"}], ids=repr)
def test_a_load_nested_in_a_load_has_a_map_location_of_its_own(
    outer_where: Any, inner: str, outer_legacy: bool, raises_first: bool
) -> None:
    """The nested load passes no map_location, so it is repaired, and the outer load goes on with its own."""
    nested: Any = tagging.Nested(tagging.dumps(torch.ones(1), "cuda:1"))
    if inner != "pickle":
        nested = tagging.NestedFile(tagging.save(torch.ones(1), "cuda:1", legacy=inner == "legacy"))
    data = tagging.save([torch.zeros(2), nested, torch.zeros(3)], legacy=outer_legacy)
    with tagging.landings() as landed, devguard.guard("cpu"):
        if raises_first:
            _load_that_raises(outer_legacy, map_location="cuda:6")
            landed.clear()
        first, holder, last = torch.load(io.BytesIO(data), map_location=outer_where, weights_only=False)
    assert (first.tolist(), holder.value.tolist(), last.tolist()) == ([0, 0], [1], [0, 0, 0])
    assert landed == (["cuda:5"] * 2 if outer_where == "cuda:5" else [])
    repaired = [stray for stray in devguard.strays() if stray.action == "repaired"]
    assert "cuda:1" in {stray.source for stray in repaired}


@pytest.mark.parametrize("outer_legacy", [False, True], ids=["outer zip", "outer legacy"])
@pytest.mark.parametrize("inner_legacy", [False, True], ids=["inner zip", "inner legacy"])
def test_an_explicit_map_location_nested_in_a_load_without_one_holds_for_the_nested_load_only(
    inner_legacy: bool, outer_legacy: bool
) -> None:
    nested = tagging.NestedFile(tagging.save(torch.ones(1), "cuda:1", legacy=inner_legacy), map_location="cuda:5")
    data = tagging.save([torch.zeros(2), nested, torch.zeros(3)], legacy=outer_legacy)
    with tagging.landings() as landed, devguard.guard("cpu"):
        torch.load(io.BytesIO(data), weights_only=False)
    assert landed == ["cuda:5"]


@pytest.mark.parametrize("outer_legacy", [False, True], ids=["outer zip", "outer legacy"])
@pytest.mark.parametrize("outer_where", [None, "cuda:5"])
def test_a_subclass_nested_in_a_load_takes_its_outer_device_from_its_own_load(
    outer_where: str | None, outer_legacy: bool
) -> None:
    nested = tagging.Nested(tagging.dumps(TwoTensor(torch.ones(1), torch.ones(1)), "cuda:1"))
    subclass = TwoTensor(torch.zeros(1), torch.zeros(1))
    data = tagging.save([subclass, nested], legacy=outer_legacy, outer=True)
    with tagging.landings():
        unguarded, _ = torch.load(io.BytesIO(data), map_location=outer_where, weights_only=False)
        with devguard.guard("cpu"):
            outer, holder = torch.load(io.BytesIO(data), map_location=outer_where, weights_only=False)
    assert str(holder.value.device) == "cpu"
    assert outer.device == (unguarded.device if outer_where else torch.device("cpu"))


@pytest.mark.parametrize("where", ["cuda:5", {"cuda:3": "cuda:5"}], ids=repr)
def test_a_subclass_loaded_after_a_load_that_raised_is_repaired(where: Any) -> None:
    value = TwoTensor(torch.zeros(1), torch.zeros(1))
    for legacy in (False, True):
        with devguard.guard("cpu"):
            _load_that_raises(legacy, map_location=where)
            repaired = torch.load(io.BytesIO(tagging.save(value, legacy=legacy, outer=True)), weights_only=False)
            assert tensors.devices(repaired) == {torch.device("cpu")}
            assert tensors.devices(pickle.loads(tagging.dumps(value))) == {torch.device("cpu")}


# --- what is written ---


@pytest.mark.parametrize("name", sorted(SPECIALS))
def test_pickle_writes_the_same_bytes_under_a_guard(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = SPECIALS[name]()
        try:
            before = [pickle.dumps(value, protocol) for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1)]
            again = [pickle.dumps(value, protocol) for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1)]
        except Exception as error:  # noqa: BLE001 - a value that torch cannot pickle must fail under a guard too
            with devguard.guard("cpu"), pytest.raises(type(error)):
                pickle.dumps(value)
            return
        assert before == again, "the value itself is not written the same way twice"
        with devguard.guard("cpu"):
            assert [pickle.dumps(value, protocol) for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1)] == before


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_torch_save_writes_the_same_bytes_under_a_guard(legacy: bool) -> None:
    value = _value()

    def written() -> bytes:
        buffer = io.BytesIO()
        torch.save(value, buffer, _use_new_zipfile_serialization=not legacy)
        return buffer.getvalue()

    before = written()
    with devguard.guard("cpu"):
        assert written() == before


def test_other_transports_write_the_same_bytes_under_a_guard() -> None:
    value = _value()
    for dumps in (cloudpickle.dumps, dill.dumps, pickle._dumps):
        before = dumps(value)
        with devguard.guard("cpu"):
            assert dumps(value) == before


def test_a_receiver_without_devguard_reads_what_a_guard_wrote() -> None:
    """The bytes contain no name of devguard."""
    with devguard.guard("cpu"):
        data = pickle.dumps(_value())
    assert b"devguard" not in data
    devguard.uninstall()
    assert tensors.describe(pickle.loads(data)) == tensors.describe(pickle.loads(pickle.dumps(_value())))


def test_the_bytes_counted_are_those_of_the_storages() -> None:
    base = torch.zeros(100, dtype=torch.float64)
    with devguard.guard("cpu"):
        torch.load(io.BytesIO(tagging.save([base, base[:2], torch.zeros(3, dtype=torch.int8)])))
    assert sum(stray.bytes for stray in devguard.strays()) == 803
