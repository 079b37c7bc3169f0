"""The door ``load`` on simulated GPUs: where storages land, what a load keeps, and which contexts it opens."""

from __future__ import annotations

import io
import pickle
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import devguard
from devguard import guard
from tests.helpers import tagging, tensors
from tests.helpers.programs import run_child


def loads(value: Any, how: str, path: Path) -> Any:
    """Write `value` and return a function that reads it back; `how` names the way."""
    if how == "pickle":
        data = pickle.dumps(value)
        return lambda **options: pickle.loads(data)
    if how == "python pickle":
        data = pickle.dumps(value)
        return lambda **options: pickle._Unpickler(io.BytesIO(data)).load()  # type: ignore[attr-defined]
    if how == "buffer":
        buffer = io.BytesIO()
        torch.save(value, buffer)
        return lambda **options: torch.load(io.BytesIO(buffer.getvalue()), **{"weights_only": False, **options})
    torch.save(value, path, _use_new_zipfile_serialization=how != "legacy")
    known = {"file": {"weights_only": False}, "weights_only": {"weights_only": True}, "mmap": {"mmap": True}}
    return lambda **options: torch.load(path, **{"weights_only": False, **known.get(how, {}), **options})


WAYS = ["pickle", "python pickle", "buffer", "file", "legacy", "weights_only", "mmap"]
EXPLICIT_WAYS = ["buffer", "file", "legacy", "weights_only", "mmap"]


@pytest.mark.parametrize("how", WAYS)
class TestEveryWay:
    def test_unguarded_the_tensor_lands_on_the_senders_device(self, how, tmp_path):
        load = loads({"x": torch.arange(8.0).to("cuda:0")}, how, tmp_path / "x.pt")
        torch.cuda.set_device(1)
        assert load()["x"].device.index == 0

    def test_guarded_the_tensor_lands_on_the_owner(self, how, tmp_path):
        value = {"x": torch.arange(8.0).to("cuda:0"), "host": torch.arange(3), "own": torch.arange(4).to("cuda:1")}
        load = loads(value, how, tmp_path / "x.pt")
        with guard(1):
            line = sys._getframe().f_lineno + 1
            got = load()
        assert [got[name].device.type for name in ("x", "host", "own")] == ["cuda", "cpu", "cuda"]
        assert got["x"].device.index == got["own"].device.index == 1
        assert got["x"].cpu().tolist() == list(range(8))
        (stray,) = devguard.strays()
        assert (stray.door, stray.source, stray.target, stray.action) == ("load", "cuda:0", "cuda:1", "repaired")
        assert (stray.bytes, stray.count) == (32, 1)
        assert stray.site.file == __file__
        assert line - 40 < stray.site.line <= line  # in `loads` above or here: both are user code

    def test_a_tag_of_a_missing_device_is_repaired(self, how, tmp_path):
        with tagging.tagged("cuda:5"):
            load = loads([torch.arange(8.0)], how, tmp_path / "x.pt")
        with pytest.raises(RuntimeError, match="CUDA device 5"):
            load()
        with guard(2):
            assert load()[0].device.index == 2

    def test_the_cpu_owner_gets_host_tensors(self, how, tmp_path):
        load = loads([torch.arange(8.0).to("cuda:3")], how, tmp_path / "x.pt")
        with guard("cpu"):
            got = load()[0]
        assert got.device.type == "cpu"
        assert got.tolist() == list(range(8))

    def test_observe_and_warn_record_and_error_refuses(self, how, tmp_path):
        load = loads([torch.arange(8.0).to("cuda:3")], how, tmp_path / "x.pt")
        with guard(1, mode="observe"):
            assert load()[0].device.index == 3
        with guard(1, doors={"load": "warn"}), pytest.warns(devguard.StrayDeviceWarning, match="32 bytes"):
            assert load()[0].device.index == 3
        before = torch.cuda.memory_stats(3).get("allocation.all.allocated", 0)
        with guard(1, mode="error"), pytest.raises(devguard.StrayDeviceError, match="owns cuda:1"):
            load()
        assert torch.cuda.memory_stats(3).get("allocation.all.allocated", 0) == before
        assert [stray.action for stray in devguard.strays()] == ["observed", "warned", "refused"]

    def test_off_and_unguarded_change_nothing(self, how, tmp_path):
        load = loads([torch.arange(8.0).to("cuda:3")], how, tmp_path / "x.pt")
        with guard(1), devguard.unguarded():
            assert load()[0].device.index == 3
        with guard(1, mode="off"):
            assert load()[0].device.index == 3
        assert devguard.strays() == ()

    def test_after_uninstall_the_tensor_lands_on_the_senders_device(self, how, tmp_path):
        load = loads([torch.arange(8.0).to("cuda:3")], how, tmp_path / "x.pt")
        with guard(1):
            devguard.uninstall()
            assert load()[0].device.index == 3


@pytest.mark.parametrize("how", EXPLICIT_WAYS)
class TestExplicitMapLocation:
    @pytest.mark.parametrize(
        "location",
        ["cuda:2", torch.device("cuda:2"), {"cuda:0": "cuda:2"}, lambda storage, tag: storage.cuda(2)],
        ids=["string", "device", "dictionary", "callable"],
    )
    def test_an_explicit_map_location_wins_and_is_recorded(self, how, location, tmp_path):
        load = loads([torch.arange(8.0).to("cuda:0")], how, tmp_path / "x.pt")
        with guard(1):
            assert load(map_location=location)[0].device.index == 2
        assert [(stray.source, stray.action) for stray in devguard.strays()] == [("cuda:2", "kept")]
        with guard(1, mode="error"), pytest.raises(devguard.StrayDeviceError, match="names that device itself"):
            load(map_location=location)

    @pytest.mark.parametrize("location", ["cpu", "cuda:1", "cuda", {"cuda:0": "cpu"}], ids=str)
    def test_a_map_location_on_the_owner_or_the_host_is_no_stray(self, how, location, tmp_path):
        load = loads([torch.arange(8.0).to("cuda:0")], how, tmp_path / "x.pt")
        with guard(1, mode="error"):
            assert load(map_location=location)[0].device in (torch.device("cpu"), torch.device("cuda:1"))
        assert devguard.strays() == ()

    def test_a_dictionary_without_the_tag_leaves_the_tag_in_charge(self, how, tmp_path):
        load = loads([torch.arange(8.0).to("cuda:0")], how, tmp_path / "x.pt")
        with guard(1):
            assert load(map_location={"cuda:3": "cpu"})[0].device.index == 1
        assert [(stray.source, stray.action) for stray in devguard.strays()] == [("cuda:0", "repaired")]

    def test_a_map_location_holds_for_its_own_load_only_even_if_that_load_raises(self, how, tmp_path):
        inner = pickle.dumps(torch.arange(4.0).to("cuda:0"))
        value = [torch.arange(8.0).to("cuda:0"), tagging.Nested(inner)]
        load = loads(value, how, tmp_path / "x.pt")
        options = {"weights_only": False}
        with guard(1):
            outer, nested = load(map_location="cpu", **options)
            assert outer.device.type == "cpu"
            assert nested.value.device.index == 1
            fail = loads([torch.arange(2.0).to("cuda:0"), tensors.Failing()], how, tmp_path / "y.pt")
            with pytest.raises(ZeroDivisionError):
                fail(map_location="cpu", **options)
            assert pickle.loads(inner).device.index == 1
            assert load(**options)[0].device.index == 1


class TestWhatIsKept:
    @settings(max_examples=60)
    @given(tensors.containers())
    def test_unpickling_keeps_everything_but_the_device(self, case):
        devguard.uninstall()
        value = tensors.to(case, "cuda:0")
        data = pickle.dumps(value)
        unguarded = tensors.describe(pickle.loads(data))
        with guard(1):
            got = pickle.loads(data)
        assert tensors.describe(got) == unguarded.replace("cuda:0", "cuda:1")

    @settings(max_examples=60)
    @given(st.sampled_from(EXPLICIT_WAYS), st.data())
    def test_torch_load_keeps_everything_but_the_device(self, tmp_path_factory, how, data):
        dtypes = tensors.DTYPES if how == "legacy" else tensors.ZIP_DTYPES
        case = data.draw(tensors.containers(dtypes))
        value = tensors.to(case, "cuda:0")
        load = loads(value, how, tmp_path_factory.mktemp("load") / "x.pt")
        unguarded = tensors.describe(load())
        with guard(1):
            got = load()
        assert tensors.describe(got) == unguarded.replace("cuda:0", "cuda:1")

    @pytest.mark.filterwarnings("ignore:(Sparse|The PyTorch API of nested):UserWarning")
    @pytest.mark.parametrize("name", sorted(tensors.SPECIAL))
    def test_special_tensors_land_on_the_owner_whole(self, name):
        tensor = tensors.SPECIAL[name]("cuda:0")
        data = pickle.dumps(tensor)
        with guard(1):
            got = pickle.loads(data)
        assert tensors.devices(got) == {torch.device("cuda:1")}
        assert tensors.describe(got) == tensors.describe(tensors.SPECIAL[name]("cuda:1"))

    def test_a_guard_does_not_change_what_is_pickled(self):
        value = {"x": torch.arange(8.0).to("cuda:0"), "y": torch.arange(3)}
        plain = pickle.dumps(value)
        with guard(1):
            assert pickle.dumps(value) == plain


class TestContexts:
    """In fresh processes, where device 0 has no context yet."""

    def data(self) -> bytes:
        return pickle.dumps(torch.arange(8.0).to("cuda:0"))

    def test_unguarded_unpickling_opens_a_context_on_the_senders_device(self):
        assert run_child("torch.cuda.set_device(1); pickle.loads(data); print(ctx())", self.data()) == "[0, 1]"

    def test_guarded_unpickling_opens_no_context_on_the_senders_device(self):
        code = (
            "with devguard.guard(1):\n"
            "    x = pickle.loads(data); print(x.device, x.tolist() == list(range(8)), ctx())\n"
            "torch.cuda.synchronize(1)\n"
            "print(ctx(), torch.cuda.memory_stats(0).get('allocation.all.peak', 0))\n"
        )
        assert run_child(code, self.data()) == "cuda:1 True [1]\n[1] 0"

    def test_unpickling_under_the_cpu_owner_does_not_initialise_cuda(self):
        code = (
            "with devguard.guard('cpu', mode='repair'):\n"
            "    x = pickle.loads(data)\n"
            "    print(x.device, devguard.status()['contexts'], torch.cuda.is_initialized())\n"
            "from devguard.support import accelerator; print(accelerator.driver_is_initialized())"
        )
        assert run_child(code, self.data()) == "cpu [] False\nFalse"

    def test_building_guards_and_reading_the_status_does_not_initialise_cuda(self):
        code = (
            "g = devguard.guard('cuda:1'); h = devguard.guard(argument='x')(lambda x: x)\n"
            "from devguard.support import accelerator\n"
            "print(ctx(), devguard.status()['contexts'], devguard.strays(), devguard.owner(),"
            " torch.cuda.is_initialized(), accelerator.driver_is_initialized())"
        )
        assert run_child(code) == "[] [] () None False False"

    def test_entering_a_guard_binds_a_context_to_a_new_thread(self):
        code = (
            "import ctypes, threading\n"
            "def work():\n"
            "    with devguard.guard(1):\n"
            "        context = ctypes.c_void_p()\n"
            "        ctypes.CDLL('libcuda.so.1').cuCtxGetCurrent(ctypes.byref(context))\n"
            "        print(bool(context.value), ctx())\n"
            "t = threading.Thread(target=work); t.start(); t.join()"
        )
        assert run_child(code) == "True [1]"

    def test_error_mode_refuses_before_a_context_is_opened(self):
        code = (
            "with devguard.guard(1, mode='error'):\n"
            "    try: pickle.loads(data)\n"
            "    except devguard.StrayDeviceError: print(ctx())\n"
        )
        assert run_child(code, self.data()) == "[1]"

    def test_a_single_visible_device_has_index_0_whatever_the_rank(self, monkeypatch):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
        monkeypatch.setenv("LOCAL_RANK", "3")
        assert run_child("with devguard.guard() as device: print(device)") == "cuda:0"


def test_each_thread_has_its_own_owner(tmp_path):
    data = pickle.dumps(torch.arange(8.0).to("cuda:0"))
    landed = {}

    def work(index):
        with guard(index):
            for _ in range(50):
                landed.setdefault(index, set()).add(pickle.loads(data).device.index)

    threads = [threading.Thread(target=work, args=(index,)) for index in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert landed == {1: {1}, 2: {2}, 3: {3}}


def test_install_sets_the_owner_of_threads_without_a_guard(tmp_path):
    data = pickle.dumps(torch.arange(8.0).to("cuda:0"))
    devguard.install(device=2)
    landed = []
    thread = threading.Thread(target=lambda: landed.append(pickle.loads(data).device.index))
    thread.start()
    thread.join()
    assert landed == [2]
    with guard(1):
        assert pickle.loads(data).device.index == 1
    assert torch.cuda.current_device() == 2
