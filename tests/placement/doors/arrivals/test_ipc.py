"""The door ``ipc``: memory and events of another process, on the owner's GPU and elsewhere."""

from __future__ import annotations

import inspect
import io
import os
import pickle
import pickletools
import sys
import threading
from collections.abc import Iterator
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch.multiprocessing import reductions

import devguard
from devguard import guard, simgpu
from tests.helpers import sglang_reductions
from tests.helpers.producer import Producer
from tests.helpers.programs import PRELUDE, run_child

# Defines a module that devguard takes for a library, and not for the program's own code.
LIBRARY = """
library = {"__name__": "some_library"}
source = "import torch\\ndef take(i): torch.cuda.set_device(i)\\ndef both(): take(0); take(1)"
exec(compile(source, "some_library.py", "exec"), library)
"""
TURNED = {"CUDA_VISIBLE_DEVICES": "1,0,2,3"}


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Producer]:
    started = Producer(tmp_path_factory.mktemp("producer"))
    yield started
    started.close()


@pytest.fixture
def producer(process: Producer) -> Producer:
    process.reset_count()
    return process


@pytest.fixture(scope="module")
def turned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Producer]:
    """A producer whose cuda:0 is our cuda:1, and the other way round."""
    process = Producer(tmp_path_factory.mktemp("turned"), TURNED)
    yield process
    process.close()


def child(code: str, data: bytes, **environment: str) -> str:
    """Run `code` in a fresh process, where it can unpickle `data`."""
    prelude = PRELUDE + "import torch.multiprocessing\nfrom devguard.support import accelerator\n"
    return run_child(code, data, prelude=prelude, environment=environment)


def opened() -> int:
    """Return how many handles this process has opened so far."""
    this_process = next(process for process in simgpu.state() if process.pid == os.getpid())
    return sum(device.ipc_opens for device in this_process.devices)


def actions() -> list[tuple[str, str, str]]:
    return [(stray.source, stray.target, stray.action) for stray in devguard.strays()]


class TestContexts:
    """In fresh processes, where no device has a context yet."""

    def test_unguarded_receiving_opens_a_context_on_the_producers_gpu(self, producer):
        code = "torch.cuda.set_device(1); x = pickle.loads(data); print(x.device, ctx())"
        assert child(code, producer.share("cuda:0")) == "cuda:0 [0, 1]"

    def test_guarded_receiving_opens_no_context_there_and_returns_an_alias(self, producer):
        code = (
            "with devguard.guard(1):\n"
            "    x = pickle.loads(data)\n"
            "    print(x.device, x.tolist(), ctx())\n"
            "    x.copy_(torch.full((4,), 7.0)); torch.cuda.synchronize()\n"
            "print(ctx(), devguard.strays()[0])"
        )
        first, second = child(code, producer.share("cuda:0")).splitlines()
        assert first == "cuda:1 [0.0, 1.0, 2.0, 3.0] [1]"
        assert second.startswith("[1] ipc: cuda:0 -> cuda:1 [owner cuda:1, repaired] 1 x, 16 bytes, at <string>:")
        assert producer.values() == [7.0] * 4

    def test_with_a_closed_door_receiving_opens_a_context_on_the_producers_gpu(self, producer):
        code = "with devguard.guard(1):\n    devguard.uninstall(); x = pickle.loads(data); print(x.device, ctx())"
        assert child(code, producer.share("cuda:0")) == "cuda:0 [0, 1]"

    def test_copying_opens_no_context_on_the_producers_gpu(self, producer):
        code = (
            "with devguard.remap(1):\n    x = pickle.loads(data)\ntorch.cuda.synchronize(1); print(x.tolist(), ctx())"
        )
        assert child(code, producer.share("cuda:0")) == "[0.0, 1.0, 2.0, 3.0] [1]"

    @pytest.mark.parametrize("how", ["tensor", "event"])
    def test_error_mode_refuses_before_a_context_is_opened(self, producer, how):
        code = (
            "with devguard.guard(1, mode='error'):\n"
            "    try: pickle.loads(data)\n"
            "    except devguard.StrayDeviceError: print(ctx())\n"
        )
        assert child(code, producer.share("cuda:0", how=how)) == "[1]"

    def test_the_cpu_owner_refuses_before_cuda_is_initialised(self, producer):
        code = (
            "with devguard.guard('cpu', mode='error'):\n"
            "    try: pickle.loads(data)\n"
            "    except devguard.StrayDeviceError as error:\n"
            "        print('silently' in str(error), accelerator.driver_is_initialized())"
        )
        assert child(code, producer.share("cuda:0")) == "True False"

    def test_a_guarded_event_opens_no_context_on_the_producers_gpu(self, producer):
        unguarded = "torch.cuda.set_device(1); e = pickle.loads(data); print(e.query(), ctx())"
        guarded = "with devguard.guard(1):\n    e = pickle.loads(data); print(e.query(), ctx(), len(devguard.strays()))"
        assert child(unguarded, producer.share("cuda:0", how="event")) == "True [0, 1]"
        assert child(guarded, producer.share("cuda:0", how="event")) == "True [1] 1"

    def test_a_guarded_empty_tensor_lands_on_the_owner(self, producer):
        code = "with {}:\n    x = pickle.loads(data); print(x.device, tuple(x.shape), ctx())"
        data = producer.share("cuda:0", shape=(0, 3))
        assert child(code.format("torch.cuda.device(1)"), data) == "cuda:0 (0, 3) [0, 1]"
        assert child(code.format("devguard.guard(1)"), data) == "cuda:1 (0, 3) [1]"
        assert child(code.format("devguard.remap(1)"), data) == "cuda:1 (0, 3) [1]"

    def test_memory_on_a_gpu_that_the_receiver_does_not_see_is_an_error_in_every_mode(self, producer):
        code = (
            "for mode in ('repair', 'error', 'off'):\n"
            "    with devguard.guard(0, mode=mode):\n"
            "        try: pickle.loads(data)\n"
            "        except RuntimeError as e:\n"
            "            print(type(e).__name__, 'CUDA_VISIBLE_DEVICES' in str(e), set(ctx()) <= {0})\n"
            "print([(s.source, s.action) for s in devguard.strays()])"
        )
        lines = child(code, producer.share("cuda:3"), CUDA_VISIBLE_DEVICES="0,1").splitlines()
        assert lines[:2] == ["DeviceResolutionError True True", "StrayDeviceError True True"]
        assert lines[2].endswith("Error False True")
        assert lines[3] == "[('cuda:3', 'observed'), ('cuda:3', 'refused')]"


class TestInAProcessThatHasHadOneOwner:
    """Memory on the only owner that a process has had takes a fast path. Each test runs in a fresh process."""

    def test_an_owner_that_was_never_entered_is_a_second_owner(self, producer):
        code = (
            "from devguard.ownership.owner import owner_of_index\nfrom devguard.ownership.process import process\n"
            "with devguard.guard(1): pass\n"
            "process.own(owner_of_index(2))  # as the environment sets it\n"
            "x = pickle.loads(data); print(x.device, [s.door for s in devguard.strays()][0])"
        )
        assert child(code, producer.share("cuda:1")) == "cuda:2 ipc"

    @pytest.mark.parametrize("how", ["guard('cpu').__enter__()", "install(device='cpu')"])
    def test_the_cpu_is_a_second_owner(self, producer, how):
        code = (
            "with devguard.guard(1): pickle.loads(data)\n"
            f"devguard.{how}\n"
            "x = pickle.loads(data); print(x.device, [s.owner for s in devguard.strays()])"
        )
        assert child(code, producer.share("cuda:1")) == "cuda:1 ['cpu']"

    def test_an_owner_of_the_process_from_before_the_door_opened_is_a_second_owner(self, producer):
        code = (
            "from devguard.ownership.owner import owner_of_index\nfrom devguard.ownership.process import process\n"
            "process.own(owner_of_index(1))  # as the environment sets it\n"
            "with devguard.guard(2): pass\n"
            "x = pickle.loads(data); print(x.device, [s.door for s in devguard.strays()][0])"
        )
        assert child(code, producer.share("cuda:2")) == "cuda:1 ipc"

    def test_a_device_change_that_was_undone_is_not_pending(self):
        code = (
            "from devguard.ownership.stack import changing\n" + LIBRARY + "with devguard.guard(1):\n"
            "    library['take'](0); print(len(changing)); library['take'](1); print(len(changing))\n"
            "    library['both'](); print(len(changing))\n"
            "    library['take'](0); print(len(changing))\n"
            "print(len(changing))"
        )
        assert child(code, b"").split() == ["1", "0", "0", "1", "0"]

    def test_a_device_change_of_a_thread_that_ended_is_not_pending(self, producer):
        code = (
            "import _thread, threading, weakref\nfrom devguard.ownership.stack import changing, local, stacks\n"
            + LIBRARY
            + "devguard.install(device=1)\n"
            "torch.cuda.set_device(1)\n"
            "ended = threading.Event()\n"
            "def run():\n"
            "    torch.cuda.set_device(1); library['take'](0)\n"
            "    weakref.finalize(local.stack, ended.set)  # the stack of a thread is freed at its end\n"
            "_thread.start_new_thread(run, ()); ended.wait()\n"
            "print(len(changing), len(stacks()))\n"
            "x = pickle.loads(data); print(x.device, len(changing))"
        )
        assert child(code, producer.share("cuda:1")) == "1 1\ncuda:1 0"

    def test_receiving_judges_a_pending_device_change(self, producer):
        code = (
            LIBRARY + "with devguard.guard(1):\n"
            "    library['take'](0); x = pickle.loads(data); print(x.device, torch.cuda.current_device())"
        )
        assert child(code, producer.share("cuda:1")) == "cuda:1 1"


class TestModes:
    def test_memory_on_the_owner_is_no_stray_in_any_mode(self, producer):
        for scope in (guard(2, mode="error"), devguard.remap(2, mode="error"), guard(2, doors={"ipc": "copy"})):
            with scope, devguard.no_strays():
                tensor = pickle.loads(producer.share("cuda:2"))
                assert tensor.device.index == 2
                producer.fill(5)
                assert tensor.tolist() == [5.0] * 4  # an alias
            del tensor
        assert producer.drop() == 0

    def test_repair_opens_the_memory_under_the_owner_and_records_it(self, producer):
        data = producer.share("cuda:0", how="integers")
        with guard(1):
            line = sys._getframe().f_lineno + 1
            tensor = pickle.loads(data)
        assert (tensor.device.index, tensor.tolist()) == (1, [0, 1, 2, 3])
        (stray,) = devguard.strays()
        assert (stray.door, stray.source, stray.target, stray.action) == ("ipc", "cuda:0", "cuda:1", "repaired")
        assert (stray.bytes, stray.dtype, stray.shape) == (32, "torch.int64", (4,))
        assert (stray.site.file, stray.site.line) == (__file__, line)
        assert producer.drop() == 512  # the producer keeps the memory for this process
        del tensor
        assert producer.drop() == 0

    def test_observe_and_warn_record_and_error_opens_nothing(self, producer):
        with guard(1, mode="observe"):
            assert pickle.loads(producer.share("cuda:3")).device.index == 3
        with (
            guard(1, doors={"ipc": "warn"}),
            pytest.warns(devguard.StrayDeviceWarning, match="16 bytes went to cuda:3"),
        ):
            assert pickle.loads(producer.share("cuda:3")).device.index == 3
        data, before = producer.share("cuda:3"), opened()
        with guard(1, mode="error"), pytest.raises(devguard.StrayDeviceError, match=r"cuda:3.*owns cuda:1.*repair"):
            pickle.loads(data)
        assert opened() == before
        assert actions() == [("cuda:3", "cuda:3", action) for action in ("observed", "warned", "refused")]

    def test_off_unguarded_allowed_and_uninstall_record_nothing(self, producer):
        with guard(1), devguard.unguarded():
            assert pickle.loads(producer.share("cuda:3")).device.index == 3
        with guard(1, doors={"ipc": "off"}):
            assert pickle.loads(producer.share("cuda:3")).device.index == 3
        devguard.allow("cuda:3")
        with guard(1):
            assert pickle.loads(producer.share("cuda:3")).device.index == 3
            devguard.uninstall()
            assert pickle.loads(producer.share("cuda:0")).device.index == 0
        assert devguard.strays() == ()

    def test_without_an_owner_the_open_door_is_inert(self, producer):
        with guard(1):
            pass
        assert pickle.loads(producer.share("cuda:3")).device.index == 3
        assert devguard.strays() == ()

    def test_the_cpu_owner_gets_no_silent_copy(self, producer):
        with guard("cpu"):
            assert pickle.loads(producer.share("cuda:3")).device.index == 3
        with devguard.remap("cpu"):
            assert pickle.loads(producer.share("cuda:3")).device.index == 3
        assert actions() == [("cuda:3", "cuda:3", "observed")] * 2
        assert "host" in devguard.strays()[0].note

    def test_copy_is_a_mode_of_this_door_only(self):
        with pytest.raises(devguard.ConfigError, match=r"door 'load': 'copy' is not a mode"):
            guard(1, doors={"load": "copy"})
        with pytest.raises(devguard.ConfigError, match=r"'copy' is not a mode"):
            guard(1, mode="copy")
        with pytest.raises(devguard.ConfigError, match=r"door 'ipc': 'move'.* error, copy, uuid\."):
            guard(1, doors={"ipc": "move"})


@pytest.mark.parametrize("scope", [guard(1, doors={"ipc": "copy"}), devguard.remap(1)], ids=["copy", "remap"])
class TestCopies:
    def test_a_copy_is_on_the_owner_and_releases_the_producers_memory_at_once(self, producer, scope):
        data = producer.share("cuda:0")
        with scope:
            tensor = pickle.loads(data)
        assert tensor.device.index == 1
        producer.fill(9)
        assert tensor.tolist() == [0.0, 1.0, 2.0, 3.0]
        assert producer.drop() == 0
        assert actions() == [("cuda:0", "cuda:1", "repaired")]

    def test_a_later_copy_of_the_same_memory_holds_its_later_values(self, producer, scope):
        with scope:
            first = pickle.loads(producer.share("cuda:0"))
            producer.fill(9)
            second = pickle.loads(producer.again())
        assert (first.tolist(), second.tolist()) == ([0.0, 1.0, 2.0, 3.0], [9.0] * 4)

    def test_memory_that_is_open_on_another_device_is_copied(self, producer, scope):
        alias = pickle.loads(producer.share("cuda:0"))
        with scope:
            tensor = pickle.loads(producer.again())
        assert (alias.device.index, tensor.device.index, tensor.tolist()) == (0, 1, [0.0, 1.0, 2.0, 3.0])

    def test_a_copy_needs_no_peer_access(self, producer, scope, monkeypatch):
        monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda device, peer: False)
        with scope:
            tensor = pickle.loads(producer.share("cuda:0"))
        assert (tensor.device.index, tensor.tolist()) == (1, [0.0, 1.0, 2.0, 3.0])
        assert producer.drop() == 0

    @pytest.mark.parametrize("how", ["parameter", "grad", "views", "integers"])
    def test_a_copy_keeps_everything_but_the_device(self, producer, scope, how):
        data = producer.share("cuda:0", how=how)
        with scope:
            got = pickle.loads(data)
        for tensor in got if how == "views" else [got]:
            assert tensor.is_leaf
            assert tensor.device.index == 1
            assert tensor.requires_grad == (how in ("parameter", "grad"))
            assert type(tensor) is (torch.nn.Parameter if how == "parameter" else torch.Tensor)
        if how == "views":
            assert [t.tolist() for t in got[:3]] == [[0, 1, 2, 3], [1, 2, 3], [[0, 2], [1, 3]]]
            # The values of got[3] are not compared: simulated GPUs have no kernel that gathers them.
            assert (got[2].stride(), got[3].shape) == ((1, 2), (2,))


class TestAliases:
    def test_views_of_one_storage_still_share_it(self, producer):
        data = producer.share("cuda:0", how="views")
        with guard(1):
            whole, rest, turned, every_second = pickle.loads(data)
        assert {t.device.index for t in (whole, rest, turned, every_second)} == {1}
        assert len({t.untyped_storage().data_ptr() for t in (whole, rest, turned, every_second)}) == 1
        assert (rest.storage_offset(), turned.stride(), every_second.stride()) == (1, (1, 2), (2,))
        assert [stray.count for stray in devguard.strays()] == [4]

    def test_parameters_keep_their_kind(self, producer):
        with guard(1):
            parameter = pickle.loads(producer.share("cuda:0", how="parameter"))
            leaf = pickle.loads(producer.share("cuda:0", how="grad"))
        assert type(parameter) is torch.nn.Parameter
        assert (parameter.requires_grad, leaf.requires_grad, leaf.is_leaf) == (True, True, True)


class TestMemoryThatIsOpenUnderAnotherDevice:
    """torch opens an allocation once in a process: a second owner gets a copy, and `note` gives the reason."""

    def test_memory_that_unguarded_code_has_opened_is_copied(self, producer):
        alias = pickle.loads(producer.share("cuda:0"))
        with guard(1):
            copy = pickle.loads(producer.again())
        assert (alias.device.index, copy.device.index, copy.tolist()) == (0, 1, [0.0, 1.0, 2.0, 3.0])
        assert actions() == [("cuda:0", "cuda:1", "repaired")]
        assert "already opened that memory on cuda:0. The owner gets a copy, not an alias" in devguard.strays()[0].note
        producer.fill(9)
        assert (alias.tolist(), copy.tolist()) == ([9.0] * 4, [0.0, 1.0, 2.0, 3.0])

    def test_memory_that_another_owner_has_opened_is_copied(self, producer):
        with guard(2):
            alias = pickle.loads(producer.share("cuda:0"))
        for owner in (0, 1):  # owner 0 is the device of the memory itself
            with guard(owner):
                copy = pickle.loads(producer.again())
            assert (copy.device.index, copy.tolist()) == (owner, [0.0, 1.0, 2.0, 3.0])
        assert alias.device.index == 2
        assert actions()[1:] == [("cuda:2", "cuda:0", "repaired"), ("cuda:2", "cuda:1", "repaired")]

    def test_two_owners_can_receive_different_parts_of_one_allocation(self, producer):
        """Small tensors are separate storages in one allocation of 2 MiB."""
        producer.do("import torch, builtins; builtins.kept = torch.arange(512.0).to('cuda:0')")
        first = producer.share("cuda:0")
        second = producer.share("cuda:0", shape=(6,))
        with guard(1):
            one = pickle.loads(first)
        with guard(2):
            two = pickle.loads(second)
        with guard(0):
            home = pickle.loads(producer.again())
        assert [(t.device.index, len(t)) for t in (one, two, home)] == [(1, 4), (2, 6), (0, 6)]
        assert two.tolist() == home.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
        del one, two, home
        assert producer.drop() == 2048
        producer.do("import builtins; del builtins.kept")

    @pytest.mark.parametrize("how", ["parameter", "grad", "views", "integers"])
    def test_the_copy_keeps_everything_but_the_device(self, producer, how):
        alias = pickle.loads(producer.share("cuda:0", how=how))
        with guard(1):
            copy = pickle.loads(producer.again())
        many = how == "views"
        for ours, theirs in zip(copy if many else [copy], alias if many else [alias], strict=True):
            assert (ours.device.index, theirs.device.index) == (1, 0)
            assert type(ours) is type(theirs)
            assert (ours.dtype, ours.shape, ours.stride()) == (theirs.dtype, theirs.shape, theirs.stride())
            assert (ours.storage_offset(), ours.is_leaf) == (theirs.storage_offset(), True)
            assert ours.requires_grad == theirs.requires_grad
            if ours.is_contiguous():
                assert ours.tolist() == theirs.tolist()
        del copy, alias, ours, theirs
        assert producer.drop() == 0

    def test_after_the_memory_is_closed_the_next_owner_gets_an_alias(self, producer):
        with guard(2):
            alias = pickle.loads(producer.share("cuda:0"))
        del alias
        with guard(1):
            alias = pickle.loads(producer.again())
        producer.fill(9)
        assert (alias.device.index, alias.tolist()) == (1, [9.0] * 4)
        assert [stray.note for stray in devguard.strays()] == [None, None]

    def test_observe_and_off_return_the_open_memory_and_error_refuses(self, producer):
        alias = pickle.loads(producer.share("cuda:0"))
        with guard(1, mode="observe"):
            again = pickle.loads(producer.again())
        assert (again.data_ptr(), again.device) == (alias.data_ptr(), alias.device)
        with guard(1, mode="off"):
            pickle.loads(producer.again())
        assert actions() == [("cuda:0", "cuda:0", "observed")]
        assert devguard.strays()[0].note == "This process has already opened that memory on cuda:0."
        with guard(1, mode="error"), pytest.raises(devguard.StrayDeviceError, match="opened that memory on cuda:0"):
            pickle.loads(producer.again())

    def test_the_copy_opens_no_context_on_the_producers_gpu(self, producer):
        code = (
            "with devguard.guard(1): one = pickle.loads(data)\n"
            "with devguard.guard(2): two = pickle.loads(data)\n"
            "torch.cuda.synchronize(2); print(one.device, two.device, two.tolist(), ctx())"
        )
        assert child(code, producer.share("cuda:0")) == "cuda:1 cuda:2 [0.0, 1.0, 2.0, 3.0] [1, 2]"

    def test_threads_of_different_owners_can_receive_at_once(self, producer):
        messages = [producer.again() if number else producer.share("cuda:0") for number in range(16)]
        wrong: list[Any] = []

        def receive(owner: int, received: list[bytes]) -> None:
            with guard(owner):
                started.wait()
                for message in received:
                    tensor = pickle.loads(message)
                    if tensor.device.index != owner or tensor.tolist() != [0.0, 1.0, 2.0, 3.0]:
                        wrong.append((owner, tensor))

        started = threading.Barrier(4)
        threads = [threading.Thread(target=receive, args=(n % 3, messages[n::4])) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []


class TestWithoutPeerAccess:
    @pytest.fixture(autouse=True)
    def _no_peers(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda device, peer: False)

    @pytest.mark.parametrize("how", ["tensor", "event"])
    def test_memory_or_event_is_recorded_with_the_reason_and_refused_in_error_mode(self, producer, how):
        with guard(1):
            pickle.loads(producer.share("cuda:3", how=how))
        (stray,) = devguard.strays()
        assert (stray.source, stray.target, stray.action) == ("cuda:3", "cuda:3", "observed")
        assert "cuda:1 has no peer access to cuda:3" in stray.note
        with guard(1, mode="error"), pytest.raises(devguard.StrayDeviceError, match="no peer access to cuda:3"):
            pickle.loads(producer.share("cuda:3", how=how))


class TestEvents:
    def test_events_follow_the_mode(self, producer):
        with guard(1, mode="observe"):
            assert pickle.loads(producer.share("cuda:3", how="event")).device.index == 3
        with guard(1):
            assert pickle.loads(producer.share("cuda:3", how="event")).device.index == 1
        with guard(3, mode="error"), devguard.no_strays():
            assert pickle.loads(producer.share("cuda:3", how="event")).device.index == 3
        assert actions() == [("cuda:3", "cuda:3", "observed"), ("cuda:3", "cuda:1", "repaired")]
        with guard("cpu", mode="error"), pytest.raises(devguard.StrayDeviceError):
            pickle.loads(producer.share("cuda:3", how="event"))


class TestDifferentVisibleLists:
    """The producer sees 1,0,2,3 where we see 0,1,2,3: its cuda:0 is our cuda:1."""

    GUARDED = "with devguard.guard({}):\n    x = pickle.loads(data); print(x.device, ctx(), len(devguard.strays()))"

    @pytest.fixture
    def uuids(self, turned):
        turned.do("import devguard; devguard.install(device=0, doors={'ipc': 'uuid'})")
        yield
        turned.do("import devguard; devguard.uninstall()")

    def test_unguarded_the_index_means_another_gpu(self, turned):
        code = "torch.cuda.set_device(1); x = pickle.loads(data); print(x.device, ctx())"
        assert child(code, turned.share("cuda:0")) == "cuda:0 [0, 1]"

    def test_uuid_is_a_mode_of_this_door_only(self):
        with pytest.raises(devguard.ConfigError, match=r"'uuid' is not a mode"):
            guard(1, mode="uuid")

    def test_only_messages_sent_inside_the_scope_carry_a_uuid(self, turned):
        plain = turned.share("cuda:0")
        turned.do(
            "import builtins, devguard; builtins.scope = devguard.guard(0, doors={'ipc': 'uuid'}); scope.__enter__()"
        )
        tagged = turned.again()
        turned.do("import builtins, devguard; scope.__exit__(None, None, None); devguard.uninstall()")
        uuid = str(torch.cuda.get_device_properties(1).uuid).encode()
        assert (uuid in plain, uuid in tagged, uuid in turned.again()) == (False, True, False)
        with guard(1, mode="error"):
            assert pickle.loads(tagged).device.index == 1

    def test_sender_and_receiver_may_see_the_gpus_in_different_orders(self, tmp_path_factory):
        code = "with devguard.guard({}, doors={{'ipc': 'uuid'}}):\n    x = pickle.loads(data); print(x.device, ctx())"
        sender = Producer(tmp_path_factory.mktemp("two"), {"CUDA_VISIBLE_DEVICES": "1,0"})
        try:
            sender.do("import devguard; devguard.install(device=0, doors={'ipc': 'uuid'})")
            data = sender.share("cuda:0")  # the second GPU of the machine
            for visible, index in (("0,1", 1), ("1,0", 0), ("1", 0)):
                got = child(code.format(index) + "; print(devguard.strays())", data, CUDA_VISIBLE_DEVICES=visible)
                assert got == f"cuda:{index} [{index}]\n()"
        finally:
            sender.close()

    def test_with_uuids_memory_on_the_owner_is_no_stray(self, turned, uuids):
        assert child(self.GUARDED.format(1), turned.share("cuda:0")) == "cuda:1 [1] 0"

    def test_with_uuids_a_stray_is_recorded_and_repaired(self, turned, uuids):
        assert child(self.GUARDED.format(0), turned.share("cuda:0")) == "cuda:0 [0] 1"

    def test_with_uuids_the_source_has_the_index_of_the_receiver(self, turned, uuids):
        with guard(0):
            assert pickle.loads(turned.share("cuda:0")).device.index == 0
            assert pickle.loads(turned.share("cuda:1")).device.index == 0
        assert actions() == [("cuda:1", "cuda:0", "repaired")]
        with guard(0, mode="observe"):
            assert pickle.loads(turned.share("cuda:0")).device.index == 1

    def test_uuids_are_read_without_an_owner_too(self, turned, uuids):
        with guard(0):
            pass
        assert pickle.loads(turned.share("cuda:0")).device.index == 1
        with guard("cpu"):
            assert pickle.loads(turned.share("cuda:0")).device.index == 1

    def test_with_uuids_an_empty_tensor_lands_on_its_own_gpu(self, turned, uuids):
        with guard(1, mode="error"):
            assert pickle.loads(turned.share("cuda:0", shape=(0,))).device.index == 1

    @pytest.mark.parametrize("how", ["tensor", "event"])
    def test_a_uuid_that_the_receiver_does_not_see_is_an_error_in_every_mode(self, turned, uuids, how):
        code = (
            "for mode in ('repair', 'error', 'off'):\n"
            "    with devguard.guard(0, mode=mode):\n"
            "        try: pickle.loads(data)\n"
            "        except RuntimeError as e:\n"
            "            print(type(e).__name__, 'CUDA_VISIBLE_DEVICES' in str(e), set(ctx()) <= {0})\n"
            "try: pickle.loads(data)\n"
            "except devguard.DeviceResolutionError: print('and without an owner')"
        )
        lines = child(code, turned.share("cuda:0", how=how), CUDA_VISIBLE_DEVICES="0").splitlines()
        kinds = ["DeviceResolutionError", "StrayDeviceError", "DeviceResolutionError"]
        assert lines == [*(f"{kind} True True" for kind in kinds), "and without an owner"]

    def test_with_uuids_events_belong_to_the_right_gpu(self, turned, uuids):
        assert child(self.GUARDED.format(1), turned.share("cuda:0", how="event")) == "cuda:1 [1] 0"
        assert child(self.GUARDED.format(0), turned.share("cuda:0", how="event")) == "cuda:0 [0] 1"
        with guard(0):
            pass
        assert pickle.loads(turned.share("cuda:0", how="event")).device.index == 1
        with guard("cpu"):
            assert pickle.loads(turned.share("cuda:0", how="event")).device.index == 1
        with guard("cpu", mode="error"), pytest.raises(devguard.StrayDeviceError, match="GPU"):
            pickle.loads(turned.share("cuda:0", how="event"))

    def test_without_uuids_an_event_is_taken_for_one_of_another_gpu(self, turned):
        assert child(self.GUARDED.format(1), turned.share("cuda:0", how="event")).endswith(" 1")

    def test_sharing_a_storage_without_a_message_keeps_the_index(self):
        devguard.install(device=1, doors={"ipc": "uuid"})
        storage = torch.arange(4.0).to("cuda:1")._typed_storage()
        assert storage._share_cuda_()[0] == 1
        assert devguard.status()["doors"]["ipc"]["sends_uuids"] is True
        devguard.uninstall()
        devguard.install(device=1)
        assert devguard.status()["doors"]["ipc"]["sends_uuids"] is False


class TestBesideSglangsPatch:
    """``monkey_patch_torch_reductions`` is called before or after the doors open, here and in the producer."""

    @pytest.fixture
    def patched_producer(self, turned):
        turned.do("from tests.helpers import sglang_reductions; sglang_reductions.monkey_patch_torch_reductions()")
        yield turned
        turned.do("from tests.helpers import sglang_reductions; sglang_reductions.restore_torch_reductions()")

    @pytest.fixture(params=["first", "second"])
    def _patched(self, request):
        if request.param == "second":
            devguard.install(device=3)
        sglang_reductions.monkey_patch_torch_reductions()
        devguard.install(device=3)
        yield
        assert devguard.uninstall() == []
        assert reductions.rebuild_cuda_tensor is sglang_reductions._rebuild_cuda_tensor_modified
        assert reductions._rebuild_cuda_tensor_original.__code__.co_filename == reductions.__file__
        sglang_reductions.restore_torch_reductions()

    @pytest.mark.usefixtures("_patched")
    def test_both_ends_can_be_patched(self, patched_producer):
        with guard(1, mode="error"):
            assert pickle.loads(patched_producer.share("cuda:0")).device.index == 1
        with guard(2):
            tensor = pickle.loads(patched_producer.share("cuda:1"))
        assert (tensor.device.index, tensor.tolist()) == (2, [0.0, 1.0, 2.0, 3.0])
        assert actions() == [("cuda:0", "cuda:2", "repaired")]

    @pytest.mark.usefixtures("_patched")
    def test_the_sender_can_be_unpatched(self, producer):
        with guard(2):
            assert pickle.loads(producer.share("cuda:0")).device.index == 2
        assert actions() == [("cuda:0", "cuda:2", "repaired")]

    @pytest.mark.usefixtures("_patched")
    def test_tensors_can_still_be_sent_and_the_uuid_is_written_once(self):
        devguard.install(device=3, doors={"ipc": "uuid"})
        function, sent = reductions.reduce_tensor(torch.arange(4.0).to("cuda:1"))
        assert function is sglang_reductions._rebuild_cuda_tensor_modified
        assert sent[6] == str(torch.cuda.get_device_properties(1).uuid)
        assert b"_rebuild_cuda_tensor_modified" in bytes(ForkingPickler.dumps(torch.arange(4.0).to("cuda:1")))

    def test_sglangs_patch_alone_can_read_devguards_uuids(self, turned):
        turned.do("import devguard; devguard.install(device=0, doors={'ipc': 'uuid'})")
        code = (
            "from tests.helpers import sglang_reductions; sglang_reductions.monkey_patch_torch_reductions()\n"
            "print(pickle.loads(data).device)"
        )
        try:
            assert child(code, turned.share("cuda:0")) == "cuda:1"
        finally:
            turned.do("import devguard; devguard.uninstall()")


def shape_of(data: bytes) -> list[Any]:
    """Return the parts that all messages about one tensor share: all but the counters and the event."""
    return [
        (op.name, None if isinstance(arg, (bytes, int)) and not isinstance(arg, bool) else arg)
        for op, arg, _ in pickletools.genops(data)
        if not op.name.startswith("BININT")  # a counter takes one byte or two
    ]


class TestPatches:
    def test_an_open_door_does_not_change_what_is_pickled(self):
        for value in (torch.arange(4.0).to("cuda:1"), torch.nn.Parameter(torch.arange(2.0).to("cuda:2"))):
            plain = bytes(ForkingPickler.dumps(value))
            with guard(1):
                assert shape_of(bytes(ForkingPickler.dumps(value))) == shape_of(plain)
        function = pickle.dumps(reductions.rebuild_cuda_tensor)
        with guard(1):
            assert pickle.dumps(reductions.rebuild_cuda_tensor) == function

    def test_uninstall_restores_everything(self):
        names = [name for name in vars(reductions) if name.startswith(("re", "_re", "storage_"))]
        before = [getattr(reductions, name) for name in names], vars(torch.storage.TypedStorage).copy()
        reducers = ForkingPickler._extra_reducers.copy()
        devguard.install(device=1)
        assert reductions.rebuild_cuda_tensor is not dict(zip(names, before[0], strict=True))["rebuild_cuda_tensor"]
        assert reductions.rebuild_cuda_tensor.__qualname__ == "rebuild_cuda_tensor"
        assert reductions.rebuild_cuda_tensor.__module__ == reductions.__name__
        assert devguard.uninstall() == []
        assert [getattr(reductions, name) for name in names] == before[0]
        assert vars(torch.storage.TypedStorage) == before[1]
        assert ForkingPickler._extra_reducers == reducers

    def test_arguments_can_be_passed_by_name(self, producer):
        devguard.install(device=1)
        calls = []

        class Spy(pickle.Unpickler):
            def find_class(self, module, name):
                found = super().find_class(module, name)
                if name != "rebuild_cuda_tensor":
                    return found
                return lambda *args: calls.append(args) or args

        Spy(io.BytesIO(producer.share("cuda:0"))).load()
        names = inspect.signature(reductions.rebuild_cuda_tensor).parameters
        tensor = reductions.rebuild_cuda_tensor(**dict(zip(names, calls[0], strict=True)))
        assert (tensor.device.index, tensor.tolist()) == (1, [0.0, 1.0, 2.0, 3.0])

    @pytest.mark.parametrize("name", ["rebuild_cuda_tensor", "rebuild_event"])
    def test_a_torch_with_other_parameters_keeps_the_door_closed_and_is_a_problem_in_the_status(
        self, monkeypatch, name
    ):
        def renamed(tensor_size, dtype, gpu): ...

        renamed.__module__ = reductions.__name__
        renamed.__qualname__ = name
        monkeypatch.setattr(reductions, name, renamed)
        devguard.install(device=1)
        row = devguard.status()["doors"]["ipc"]
        assert row["open"] is False
        assert "has no parameter" in row["problem"]
        assert name in row["problem"]
        assert getattr(reductions, name) is renamed
        assert not hasattr(reductions.reduce_tensor, "__wrapped__")

    def test_an_unknown_patch_keeps_the_door_closed_and_is_a_problem_in_the_status(self, monkeypatch):
        def theirs(*args): ...

        monkeypatch.setattr(reductions, "rebuild_cuda_tensor", theirs)
        devguard.install(device=1)
        row = devguard.status()["doors"]["ipc"]
        assert (row["open"], "theirs" in row["problem"]) == (False, True)


@guard(argument="gpu_id")
def consume(gpu_id: int, tensors: Any, answers: Any) -> None:
    """Take two tensors off a queue, write into the first, and send their devices."""
    first, second = tensors.get(), tensors.get()
    first.copy_(torch.full((4,), 8.0))
    torch.cuda.synchronize()
    answers.put((str(first.device), str(second.device), second.tolist(), [d.index for d in devguard.contexts()]))
    del first, second
    tensors.get()  # the parent puts None after it has read the values


@pytest.mark.parametrize("kind", ["Queue", "SimpleQueue"])
def test_a_queue_delivers_tensors_onto_the_receivers_owner(kind):
    context = mp.get_context("spawn")
    tensors, answers = getattr(context, kind)(), context.SimpleQueue()
    process = context.Process(target=consume, args=(1, tensors, answers))
    process.start()
    stray, own = torch.arange(4.0).to("cuda:0"), torch.arange(3.0).to("cuda:1")
    tensors.put(stray)
    tensors.put(own)
    assert answers.get() == ("cuda:1", "cuda:1", [0.0, 1.0, 2.0], [1])
    assert stray.tolist() == [8.0] * 4
    tensors.put(None)
    process.join()
    assert process.exitcode == 0
