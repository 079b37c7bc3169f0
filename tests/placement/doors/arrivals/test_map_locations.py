"""The door ``load`` on simulated GPUs: what an explicit ``map_location`` names, and what it leaves to the tag."""

from __future__ import annotations

import collections
import io
import threading
from typing import Any

import pytest
import torch
from torch.serialization import default_restore_location

import devguard
from devguard import guard
from tests.helpers import tagging

LEGACY = pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])


def saved(device: str = "cuda:0", *, legacy: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save([torch.arange(8.0).to(device)], buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def load(data: bytes, location: Any) -> Any:
    return torch.load(io.BytesIO(data), map_location=location, weights_only=False)[0]


def actions() -> list[tuple[str, str, str]]:
    return [(stray.source, stray.action, stray.target) for stray in devguard.strays() if stray.door == "load"]


def bytes_on(index: int) -> int:
    return int(torch.cuda.memory_stats(index).get("allocation.all.allocated", 0))


class Getter(dict):  # type: ignore[type-arg]
    """A dictionary that answers every tag, although it is empty."""

    def get(self, key: str, default: Any = None) -> Any:
        return "cuda:2"


class Careful(dict):  # type: ignore[type-arg]
    """A dictionary whose `get` changes the default."""

    def get(self, key: str, default: Any = None) -> Any:
        return super().get(key, default.strip())


# All of these leave the tag in charge: the program names no device.
BY_TAG: dict[str, Any] = {
    "an empty dictionary": {},
    "a dictionary without the key": {"cuda:3": "cpu"},
    "a defaultdict": collections.defaultdict(lambda: "cpu"),
    "an OrderedDict": collections.OrderedDict({"cuda:7": "cuda:0"}),
    "a function that returns None": lambda storage, tag: None,
    "a function that returns None for this tag": lambda storage, tag: {"cuda:3": storage}.get(tag),
    "torch's own function": torch.serialization.default_restore_location,
    "torch's own function by another name": default_restore_location,
    "a function that passes the tag on": lambda storage, tag: default_restore_location(storage, tag),
    "a function that passes the tag on to the module": lambda storage, tag: (
        torch.serialization.default_restore_location(storage, tag)
    ),
}


@LEGACY
@pytest.mark.parametrize("how", BY_TAG)
class TestTheTagIsInCharge:
    def test_it_is_repaired_before_a_byte_is_elsewhere(self, how, legacy):
        data = saved(legacy=legacy)
        before = bytes_on(0)
        with guard(1):
            got = load(data, BY_TAG[how])
        assert (got.device.index, got.tolist()) == (1, list(range(8)))
        assert actions() == [("cuda:0", "repaired", "cuda:1")]
        assert bytes_on(0) == before

    def test_mode_error_refuses_before_a_byte_is_elsewhere(self, how, legacy):
        data = saved(legacy=legacy)
        before = bytes_on(0)
        with guard(1, mode="error"), pytest.raises(devguard.StrayDeviceError, match="Pass map_location"):
            load(data, BY_TAG[how])
        assert bytes_on(0) == before

    def test_observe_off_allowed_and_unguarded_load_as_torch_does(self, how, legacy):
        data = saved(legacy=legacy)
        with guard(1, mode="observe"):
            assert load(data, BY_TAG[how]).device.index == 0
        assert actions() == [("cuda:0", "observed", "cuda:0")]
        with guard(1, mode="off"):
            assert load(data, BY_TAG[how]).device.index == 0
        with guard(1), devguard.unguarded():
            assert load(data, BY_TAG[how]).device.index == 0
        with guard(1, mode="error"):
            devguard.allow("cuda:0")
            assert load(data, BY_TAG[how]).device.index == 0

    def test_the_owners_own_tag_and_the_cpu_are_no_strays(self, how, legacy):
        with guard(1, mode="error"):
            assert load(saved("cuda:1", legacy=legacy), BY_TAG[how]).device.index == 1
            assert load(saved("cpu", legacy=legacy), BY_TAG[how]).device.type == "cpu"
        assert actions() == []

    def test_the_cpu_owner_keeps_it_on_the_host(self, how, legacy):
        data = saved(legacy=legacy)
        with guard("cpu"):
            assert load(data, BY_TAG[how]).device.type == "cpu"
        assert actions() == [("cuda:0", "repaired", "cpu")]


# All of these name cuda:2.
NAMED: dict[str, Any] = {
    "a string": "cuda:2",
    "a device": torch.device("cuda:2"),
    "a dictionary": {"cuda:0": "cuda:2"},
    "a dictionary with its own get": Getter(),
    "the storage's method": lambda storage, tag: storage.cuda(2),
    "the storage's method `to`": lambda storage, tag: storage.to(device="cuda:2"),
    "the storage's method `to`, a device": lambda storage, tag: storage.to(device=torch.device("cuda", 2)),
    "torch's function": lambda storage, tag: default_restore_location(storage, "cuda:2"),
    "a new storage": lambda storage, tag: torch.UntypedStorage(storage.nbytes(), device="cuda:2").copy_(storage),
    "a method": type("Map", (), {"__call__": lambda self, storage, tag: storage.cuda(2)})(),
}
TOO_LATE = {"a new storage"}  # made by the function without its argument's methods


@LEGACY
@pytest.mark.parametrize("how", NAMED)
class TestANamedDevice:
    def test_it_is_obeyed_and_recorded_once(self, how, legacy):
        with guard(1):
            got = load(saved(legacy=legacy), NAMED[how])
        assert (got.device.index, got.tolist()) == (2, list(range(8)))
        assert actions() == [("cuda:2", "kept", "cuda:2")]
        assert [stray.count for stray in devguard.strays()] == [1]

    def test_mode_error_refuses_it_before_a_byte_is_there(self, how, legacy):
        before = bytes_on(2)
        with guard(1, mode="error"), pytest.raises(devguard.StrayDeviceError, match="names that device itself"):
            load(saved(legacy=legacy), NAMED[how])
        assert (bytes_on(2) == before) == (how not in TOO_LATE)

    def test_on_the_owner_it_is_no_stray(self, how, legacy):
        with guard(2, mode="error"):
            assert load(saved(legacy=legacy), NAMED[how]).device.index == 2
        assert actions() == []

    def test_an_allowed_device_is_no_stray(self, how, legacy):
        with guard(1, mode="error"):
            devguard.allow("cuda:2")
            assert load(saved(legacy=legacy), NAMED[how]).device.index == 2
        assert actions() == []


def test_a_dictionary_that_names_the_stray_tag_itself_is_obeyed():
    with guard(1):
        assert load(saved(), {"cuda:0": "cuda:0"}).device.index == 0
    assert actions() == [("cuda:0", "kept", "cuda:0")]
    with guard(1, mode="error"), pytest.raises(devguard.StrayDeviceError, match="names that device itself"):
        load(saved(), {"cuda:0": "cuda:0"})


def test_a_function_that_names_the_stray_tag_itself_is_obeyed():
    with guard(1):
        assert load(saved("cuda:3"), lambda storage, tag: storage.cuda(3)).device.index == 3
        assert load(saved(), lambda storage, tag: default_restore_location(storage, "cuda:0")).device.index == 0
    assert actions() == [("cuda:3", "kept", "cuda:3"), ("cuda:0", "kept", "cuda:0")]


def test_a_dictionary_whose_get_changes_its_default_is_read_as_torch_reads_it():
    with guard(1):
        assert load(saved(), Careful()).device.index == 0 or actions()
    assert load(saved(), Careful()).device.index == 0


def test_a_function_may_keep_the_storage_and_gets_no_attribute_of_devguard():
    seen = []

    def keep(storage, tag):
        seen.append(storage)
        return storage

    with guard(1, mode="error"):
        assert load(saved(), keep).device.type == "cpu"
    assert "to" not in vars(seen[0])
    assert seen[0].to(device="cuda:2").device.index == 2


def test_a_function_that_raises_leaves_nothing_behind():
    seen = []

    def fail(storage, tag):
        seen.append(storage)
        raise ZeroDivisionError

    with guard(1), pytest.raises(ZeroDivisionError):
        load(saved(), fail)
    assert "to" not in vars(seen[0])


def test_a_function_that_moves_twice_is_judged_twice():
    with guard(1, mode="observe"):
        got = load(saved(), lambda storage, tag: storage.cuda(2) and storage.cuda(3))
    assert got.device.index == 3
    assert [source for source, *_ in actions()] == ["cuda:2", "cuda:3"]


def test_a_load_nested_in_a_function_is_judged_by_its_own_location():
    inner = saved("cuda:3")
    found = []

    def nested(storage, tag):
        found.append((load(inner, None).device.index, load(inner, "cuda:2").device.index))
        return storage

    with guard(1):
        assert load(saved(), nested).device.type == "cpu"
    assert found == [(1, 2)]
    assert actions() == [("cuda:3", "repaired", "cuda:1"), ("cuda:2", "kept", "cuda:2")]


BARE: dict[str, Any] = {
    "a string": "cuda",
    "a device": torch.device("cuda"),
    "a dictionary": {"cuda:0": "cuda"},
    "the storage's method": lambda storage, tag: storage.cuda(),
    "torch's function": lambda storage, tag: default_restore_location(storage, "cuda"),
}


@LEGACY
@pytest.mark.parametrize("how", BARE)
class TestWithoutAnIndex:
    def test_it_is_the_owner_where_the_owner_is_current(self, how, legacy):
        with guard(1, mode="error"):
            assert load(saved(legacy=legacy), BARE[how]).device.index == 1
        assert actions() == []

    def test_the_device_that_the_program_made_current_is_obeyed(self, how, legacy):
        data = saved(legacy=legacy)
        with guard(1), torch.cuda.device(2):
            assert load(data, BARE[how]).device.index == 2
        assert actions() == [("cuda:2", "kept", "cuda:2")]
        with guard(1, mode="error"), torch.cuda.device(2), pytest.raises(devguard.StrayDeviceError, match="itself"):
            load(data, BARE[how])
        devguard.allow("cuda:2")
        with guard(1, mode="error"), torch.cuda.device(2):
            assert load(data, BARE[how]).device.index == 2


UNCHOSEN = """
import io, threading
from torch.serialization import default_restore_location
started, entered = threading.Event(), threading.Event()
landed = []
BARE = {
    "string": "cuda", "device": torch.device("cuda"), "dictionary": {"cuda:2": "cuda"},
    "method": lambda storage, tag: storage.cuda(),
    "function": lambda storage, tag: default_restore_location(storage, "cuda"),
}
def work():
    started.set(); entered.wait()
    landed.append(str(torch.load(io.BytesIO(data), map_location=BARE[sys.argv[1]]).device))
thread = threading.Thread(target=work); thread.start(); started.wait()  # before the doors open, so on device 0
devguard.install(device=1); entered.set(); thread.join()
print(*landed, ctx(), *((stray.source, stray.action) for stray in devguard.strays() if stray.door == "load"))
"""


@pytest.mark.parametrize("how", ["string", "device", "dictionary", "method", "function"])
def test_without_an_index_on_a_thread_that_chose_no_device_it_is_the_owner(how):
    from tests.helpers.programs import run_child

    buffer = io.BytesIO()
    torch.save(torch.arange(4.0).to("cuda:2"), buffer)
    printed = run_child(UNCHOSEN, buffer.getvalue(), arguments=[how])
    assert printed == "cuda:1 [1] ('cuda:0', 'repaired')"


@pytest.mark.parametrize("tag", ["cudafoo:0", "cudafoo", "cudax", "cuda_remote:1"])
def test_a_tag_that_only_begins_with_cuda_is_left_to_its_own_package(tag):
    restored = []

    def restore(storage, location):
        if location != tag:
            return None
        restored.append(location)
        return storage

    with tagging._registered(1.5, lambda storage: tag if storage.device.type == "cpu" else None, restore):
        buffer = io.BytesIO()
        torch.save([torch.arange(8.0)], buffer)
        for location in (None, {}, {"cuda:0": "cpu"}, lambda storage, location: None, tag, {tag: tag}):
            with guard(1, mode="error"):
                assert load(buffer.getvalue(), location).device.type == "cpu"
            with guard("cpu", mode="error"):
                assert load(buffer.getvalue(), location).device.type == "cpu"
    assert restored == [tag] * 12
    assert devguard.strays() == ()


def test_a_package_that_restores_its_own_tag_on_another_gpu_is_recorded():
    with tagging._registered(
        1.5,
        lambda storage: "shelf" if storage.device.type == "cpu" else None,
        lambda storage, location: storage.cuda(2) if location == "shelf" else None,
    ):
        buffer = io.BytesIO()
        torch.save([torch.arange(8.0)], buffer)
        with guard(1):
            assert load(buffer.getvalue(), None).device.index == 2
        with guard(1, mode="error"), pytest.raises(devguard.StrayDeviceError):
            load(buffer.getvalue(), None)
        with guard(2, mode="error"):
            assert load(buffer.getvalue(), None).device.index == 2
    assert [action for _, action, _ in actions()] == ["kept", "refused"]


def test_a_package_for_cuda_tags_restores_for_the_owner():
    asked = []

    def restore(storage, location):
        asked.append(location)

    with tagging._registered(1.5, lambda storage: None, restore), guard(1):
        assert load(saved(), None).device.index == 1
    assert asked == ["cuda:1"]


def test_the_default_device_of_a_block_does_not_matter():
    with guard(1), torch.device("cuda:2"):
        assert load(saved(), None).device.index == 1
        assert load(saved(), {}).device.index == 1
        assert load(saved(), "cpu").device.type == "cpu"


def test_other_settings_of_loads_do_not_matter(tmp_path):
    path = tmp_path / "x.pt"
    torch.save([torch.arange(8.0).to("cuda:0")], path)
    endianness = torch.serialization.get_default_load_endianness()
    torch.serialization.set_default_load_endianness(torch.serialization.LoadEndianness.LITTLE)
    try:
        with guard(1):
            for options in ({}, {"mmap": True}, {"weights_only": False}):
                for location in (None, {}):
                    (got,) = torch.load(path, map_location=location, **options)
                    assert (got.device.index, got.tolist()) == (1, list(range(8)))
    finally:
        torch.serialization.set_default_load_endianness(endianness)


def test_a_load_that_skips_the_data_lands_on_the_owner():
    data = saved()
    with guard(1), torch.serialization.skip_data():
        assert load(data, None).device.index == 1
        assert load(data, {}).device.index == 1


def test_a_load_of_fake_tensors_puts_nothing_anywhere():
    from torch._subclasses.fake_tensor import FakeTensorMode

    data = saved()
    before = bytes_on(0), bytes_on(1)
    with guard(1), FakeTensorMode():
        assert load(data, None).device.index == 1
    assert (bytes_on(0), bytes_on(1)) == before


def test_a_subclass_has_the_device_of_its_parts_where_the_dictionary_lacks_the_tag():
    from torch.testing._internal.two_tensor import TwoTensor

    buffer = io.BytesIO()
    torch.save(TwoTensor(torch.ones(2, device="cuda:0"), torch.ones(2, device="cuda:0")), buffer)
    with guard(1):
        got = torch.load(io.BytesIO(buffer.getvalue()), map_location={"cuda:3": "cpu"}, weights_only=False)
    assert {str(got.device), str(got.a.device), str(got.b.device)} == {"cuda:1"}


def test_a_subclass_on_an_allowed_device_has_the_device_of_its_parts():
    from torch.testing._internal.two_tensor import TwoTensor

    buffer = io.BytesIO()
    torch.save(TwoTensor(torch.ones(2, device="cuda:0"), torch.ones(2, device="cuda:0")), buffer)
    with guard(1):
        devguard.allow("cuda:0")
        got = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    assert {str(got.device), str(got.a.device), str(got.b.device)} == {"cuda:0"}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_a_distributed_checkpoint_lands_on_the_owner(tmp_path):
    import torch.distributed.checkpoint as dcp

    dcp.save({"weight": torch.arange(4.0), "extra": [torch.arange(8.0).to("cuda:0")]}, checkpoint_id=tmp_path)
    state: Any = {"weight": torch.zeros(4, device="cuda:1"), "extra": [torch.zeros(8)]}
    with guard(1):
        dcp.load(state, checkpoint_id=tmp_path)
    assert state["weight"].tolist() == [0, 1, 2, 3]
    devices = {str(value.device) for value in (state["weight"], *state["extra"])}
    assert "cuda:0" not in devices


def test_threads_with_functions_do_not_see_each_others_storages():
    data, landed = saved(), {}

    def work(index):
        with guard(index):
            for _ in range(20):
                got = load(data, lambda storage, tag: storage.cuda(3))
                landed.setdefault(index, set()).add((got.device.index, load(data, {}).device.index))

    threads = [threading.Thread(target=work, args=(index,)) for index in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert landed == {1: {(3, 1)}, 2: {(3, 2)}}
