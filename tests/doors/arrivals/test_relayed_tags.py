"""Relays: data that a ``cpu`` owner received from a GPU carries its old tag when it is pickled again."""

from __future__ import annotations

import copy
import gc
import io
import multiprocessing
import pickle
import sys
import threading
import zipfile
from collections.abc import Callable
from typing import Any

import cloudpickle
import pytest
import torch
import torch.package.package_importer

import devguard
from devguard.doors.arrivals import relayed_tags
from tests.helpers import tagging, tensors
from tests.helpers.relays import TAG, module_with, received, sent_to, typed
from tests.helpers.torch_state import changed, everything_in_torch, relay_something

pytestmark = pytest.mark.usefixtures("clean")


def test_relayed_data_reaches_the_final_receiver_with_its_old_tag() -> None:
    tensor = received()
    assert tensor.device.type == "cpu"
    assert tensor.tolist() == [0, 1, 2, 3, 4, 5]
    with devguard.guard("cpu"):
        data = pickle.dumps(tensor)
    assert sent_to(data) == [TAG]
    with tagging.landings():
        assert pickle.loads(data).tolist() == [0, 1, 2, 3, 4, 5]


def test_the_relayed_bytes_equal_those_of_the_sender() -> None:
    tensor = received()
    with devguard.guard("cpu"):
        data = pickle.dumps(tensor)
    assert data == tagging.dumps(tensor)


def test_the_tag_is_lost_while_the_door_is_closed() -> None:
    tensor = received()
    devguard.uninstall()
    assert sent_to(pickle.dumps(tensor)) == []


def test_a_chain_of_relays_keeps_the_tag() -> None:
    tensor = received()
    for _ in range(3):
        with devguard.guard("cpu"):
            tensor = pickle.loads(pickle.dumps(tensor))
    with devguard.guard("cpu"):
        assert sent_to(pickle.dumps(tensor)) == [TAG]


def test_each_tensor_keeps_the_tag_of_its_own_sender() -> None:
    with devguard.guard("cpu"):
        one = pickle.loads(tagging.dumps(torch.ones(1), "cuda:1"))
        two = pickle.loads(tagging.dumps(torch.ones(2), "cuda:2"))
        data = pickle.dumps([one, two, torch.ones(3)])
    assert sent_to(data) == ["cuda:1", "cuda:2"]


KEEP: dict[str, Callable[[torch.Tensor], Any]] = {
    "the tensor": lambda tensor: tensor,
    "a view": lambda tensor: tensor[2:4],
    "a reshaped view": lambda tensor: tensor.view(2, 3).t(),
    "detach": lambda tensor: tensor.detach(),
    "a parameter": lambda tensor: torch.nn.Parameter(tensor),
    "a parameter's data": lambda tensor: torch.nn.Parameter(tensor).data,
    "contiguous": lambda tensor: tensor.contiguous(),
    "the same type": lambda tensor: tensor.to(torch.float32),
    "the same type by its method": lambda tensor: tensor.float(),
    "the type of a tensor of the same sender": lambda tensor: tensor.to(tensor[:1]),
    "shared memory": lambda tensor: tensor.share_memory_(),
    "requires a gradient": lambda tensor: tensor.requires_grad_(),
    "assigned to another tensor's data": lambda tensor: _with_data(tensor),
    "copied into": lambda tensor: tensor.copy_(torch.ones(6)),
    "read": lambda tensor: (tensor.numpy().sum(), tensor.tolist(), tensor.cpu().sum()) and tensor,
    "in a module": lambda tensor: module_with(tensor),
    "a module of the same type": lambda tensor: module_with(tensor).float(),
    "a container": lambda tensor: {"a": [tensor]},
    "a shallow copy": lambda tensor: copy.copy({"a": tensor}),
    "the storage": lambda tensor: typed(tensor),
    "a new tensor on the storage": lambda tensor: torch.empty(0).set_(tensor.untyped_storage()),
    "changed in place": lambda tensor: tensor.add_(1),
}


def _with_data(tensor: torch.Tensor) -> torch.Tensor:
    other = torch.zeros(1)
    other.data = tensor
    return other


def _loaded(tensor: torch.Tensor, **options: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    buffer.seek(0)
    return torch.load(buffer, **options)


LOSE: dict[str, Callable[[torch.Tensor], Any]] = {
    "clone": lambda tensor: tensor.clone(),
    "deepcopy": lambda tensor: copy.deepcopy(tensor),
    "cat": lambda tensor: torch.cat([tensor, tensor]),
    "arithmetic": lambda tensor: tensor + 1,
    "another type": lambda tensor: tensor.to(torch.float64),
    "numpy": lambda tensor: torch.from_numpy(tensor.numpy()),
    "numpy, shared": lambda tensor: torch.as_tensor(tensor.numpy()),
    "a new tensor": lambda tensor: torch.tensor(tensor.tolist()),
    "like it": lambda tensor: torch.empty_like(tensor).copy_(tensor),
    "stacked": lambda tensor: torch.stack([tensor]),
    "the other tensor's data assigned": lambda tensor: _assign(tensor, torch.ones(2)),
    "saved and loaded": lambda tensor: _loaded(tensor),
    "saved and loaded onto the host": lambda tensor: _loaded(tensor, map_location="cpu"),
    "a clone of the storage": lambda tensor: torch.empty(0).set_(tensor.untyped_storage().clone()),
}


def _assign(tensor: torch.Tensor, data: torch.Tensor) -> torch.Tensor:
    tensor.data = data
    return tensor


@pytest.mark.parametrize("how", KEEP)
def test_a_value_that_shares_the_storage_keeps_the_tag(how: str) -> None:
    value = KEEP[how](received())
    with devguard.guard("cpu"):
        assert sent_to(pickle.dumps(value)) == [TAG]
        assert sent_to(cloudpickle.dumps(value)) == [TAG]


@pytest.mark.parametrize("how", LOSE)
def test_a_value_with_a_new_storage_loses_the_tag(how: str) -> None:
    value = LOSE[how](received())
    with devguard.guard("cpu"):
        assert sent_to(pickle.dumps(value)) == []


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("how", sorted(set(KEEP) - {"the storage"}))
def test_outside_every_guard_a_tensor_on_the_host_is_pickled_as_one(how: str) -> None:
    value = KEEP[how](received())
    assert sent_to(pickle.dumps(value)) == []
    with devguard.guard("cpu"):
        with devguard.unguarded():
            assert sent_to(pickle.dumps(value)) == []
        for mode in ("off", "observe", "warn"):
            with devguard.guard("cpu", mode=mode):
                assert sent_to(pickle.dumps(value)) == []
        assert sent_to(pickle.dumps(value)) == [TAG]


def test_a_process_that_owns_cpu_relays_on_every_thread() -> None:
    devguard.install("repair", "cpu")
    tensor, sent = pickle.loads(tagging.dumps(torch.arange(6.0))), []
    thread = threading.Thread(target=lambda: sent.append(pickle.dumps(tensor)))
    thread.start()
    thread.join()
    devguard.uninstall()
    assert sent_to(sent[0]) == [TAG]


def test_the_tag_outlives_the_first_tensor_and_its_storage_object() -> None:
    base = received()
    view = base[1:]
    del base
    gc.collect()
    with devguard.guard("cpu"):
        assert sent_to(pickle.dumps(view)) == [TAG]


def test_the_tag_does_not_pass_to_another_tensor_at_the_same_address() -> None:
    for _ in range(20):
        tensor = received()
        del tensor
        fresh = torch.zeros(6)
        with devguard.guard("cpu"):
            assert sent_to(pickle.dumps(fresh)) == []


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_torch_save_writes_the_actual_device(legacy: bool) -> None:
    tensor = received()
    buffer = io.BytesIO()
    with devguard.guard("cpu"):
        torch.save({"a": tensor}, buffer, _use_new_zipfile_serialization=not legacy)
    buffer.seek(0)
    with tagging.landings() as landed:
        assert torch.load(buffer)["a"].tolist() == [0, 1, 2, 3, 4, 5]
    assert landed == []
    assert b"cuda" not in buffer.getvalue()


def test_torch_save_writes_the_actual_device_and_a_nested_pickle_the_old_tag() -> None:
    tensor = received()

    class Holder:
        def __reduce__(self) -> Any:
            return pickle.loads, (pickle.dumps(tensor),)

    buffer = io.BytesIO()
    with devguard.guard("cpu"):
        torch.save([tensor, Holder(), tensor], buffer)
    with tagging.landings() as landed:
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    assert landed == [TAG]
    with zipfile.ZipFile(buffer) as archive:
        names = [name for name in archive.namelist() if "/data/" in name]
    assert len(names) == 1


def test_data_from_torch_load_is_relayed_too() -> None:
    with devguard.guard("cpu"):
        value = torch.load(io.BytesIO(tagging.save(torch.ones(2))))
        assert sent_to(pickle.dumps(value)) == [TAG]


def test_an_explicit_map_location_is_no_relay() -> None:
    with devguard.guard("cpu"):
        value = torch.load(io.BytesIO(tagging.save(torch.ones(2))), map_location="cpu")
        assert sent_to(pickle.dumps(value)) == []


def test_deepcopy_is_a_copy_on_the_host_and_not_a_relay() -> None:
    value = copy.deepcopy(received())
    assert value.device.type == "cpu"
    assert not hasattr(value.untyped_storage(), relayed_tags._ATTRIBUTE)


def test_a_multiprocessing_queue_sends_shared_memory_without_the_tag() -> None:
    assert "torch.multiprocessing.reductions" in sys.modules
    tensor = received()
    receiver, sender = multiprocessing.Pipe(duplex=False)
    with receiver, sender, devguard.guard("cpu", mode="error"), tagging.landings() as landed:
        sender.send(tensor)
        assert receiver.recv().tolist() == [0, 1, 2, 3, 4, 5]
    assert landed == []


def test_a_subclass_is_relayed_whole() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    value = received(TwoTensor(torch.ones(2), torch.zeros(2)))
    with devguard.guard("cpu"):
        data = pickle.dumps(value)
    with tagging.landings() as landed:
        back = pickle.loads(data)
    assert landed == [TAG, TAG]
    assert (back.a.tolist(), back.b.tolist()) == ([1, 1], [0, 0])


def test_threads_that_relay_at_once_do_not_mix_their_tags() -> None:
    with devguard.guard("cpu"):
        relayed = [pickle.loads(tagging.dumps(torch.ones(8), f"cuda:{index}")) for index in range(4)]
    plain = torch.ones(8)
    wrong: list[Any] = []
    barrier = threading.Barrier(4)

    def work(index: int) -> None:
        barrier.wait()
        with devguard.guard("cpu"):
            for _ in range(50):
                if f"cuda:{index}".encode() not in pickle.dumps(relayed[index]) or b"cuda" in pickle.dumps(plain):
                    wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_pickle_that_fails_leaves_no_tag_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = received()
    with devguard.guard("cpu"), monkeypatch.context() as patch:
        patch.setattr(torch, "save", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pickle.dumps(tensor)
    buffer = io.BytesIO()
    with devguard.guard("cpu"):
        torch.save(tensor, buffer)
    assert b"cuda" not in buffer.getvalue()


def test_the_status_counts_kept_and_relayed_storages() -> None:
    before = relayed_tags.status()
    tensor = received()
    with devguard.guard("cpu"):
        pickle.dumps([tensor, tensor[1:], torch.ones(1)])
        now = devguard.status()["doors"]["load"]["relay"]
    assert now["kept"] == before["kept"] + 1
    assert now["relayed"] == before["relayed"] + 2


def test_only_repaired_strays_are_marked() -> None:
    with devguard.guard("cpu"):
        value = pickle.loads(pickle.dumps(torch.ones(1)))
        assert not hasattr(value.untyped_storage(), relayed_tags._ATTRIBUTE)
        with tagging.landings(), devguard.guard("cpu", mode="observe"):
            value = pickle.loads(tagging.dumps(torch.ones(1)))
        assert not hasattr(value.untyped_storage(), relayed_tags._ATTRIBUTE)


def test_a_received_value_equals_the_value_that_was_sent() -> None:
    value = {"a": torch.arange(3), "b": torch.ones(2, dtype=torch.bool)}
    with devguard.guard("cpu"):
        assert tensors.describe(received(value)) == tensors.describe(value)


# patched at the first relay, not before
PATCHED_FOR_RELAYS = {"TypedStorage.__reduce__", "_StorageBase.__reduce__", "torch.serialization.location_tag"}


def test_pickling_is_not_patched_before_the_first_relay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relayed_tags, "_state", relayed_tags._State())
    before = everything_in_torch()
    registry = list(torch.serialization._package_registry)
    devguard.install("repair", "cpu")
    assert not changed(before, everything_in_torch()) & PATCHED_FOR_RELAYS
    assert torch.serialization._package_registry == registry
    relay_something()
    devguard.uninstall()
    devguard.install("repair", "cpu")  # storages received earlier keep their tags
    assert changed(before, everything_in_torch()) >= PATCHED_FOR_RELAYS
    devguard.uninstall()
