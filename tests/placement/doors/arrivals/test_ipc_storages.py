"""The door ``ipc`` on simulated GPUs: programs that open a handle themselves, without ``torch.multiprocessing``."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.multiprocessing import reductions
from torch.multiprocessing.reductions import rebuild_cuda_tensor as early_rebuild

import devguard
from devguard import guard
from tests.helpers.producer import Producer
from tests.helpers.programs import PRELUDE, run_child

ORIGINAL = torch.UntypedStorage._new_shared_cuda


@pytest.fixture(scope="module")
def producer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Producer]:
    started = Producer(tmp_path_factory.mktemp("producer"))
    yield started
    started.close()


class Captured(pickle.Unpickler):
    """Reads a message without opening what it carries; its result is the arguments of ``rebuild_cuda_tensor``."""

    def find_class(self, module: str, name: str) -> Any:
        return (lambda *args: args) if name == "rebuild_cuda_tensor" else super().find_class(module, name)


def arguments(message: bytes) -> tuple[Any, ...]:
    import io

    args: tuple[Any, ...] = Captured(io.BytesIO(message)).load()
    return args


def handle(message: bytes) -> tuple[Any, ...]:
    """Return what ``_share_cuda_`` returned in the sender."""
    args = arguments(message)
    return (*args[6:10], *args[11:])


class Special(torch.UntypedStorage):
    """A subclass, as some frameworks define one."""


@pytest.fixture(autouse=True)
def _door_is_open() -> None:
    with guard(0):
        pass


WAYS: dict[str, Callable[..., Any]] = {
    "the class": lambda *args: torch.UntypedStorage._new_shared_cuda(*args),
    "an instance": lambda *args: torch.UntypedStorage()._new_shared_cuda(*args),
    "a subclass": lambda *args: Special._new_shared_cuda(*args),
    "a typed storage": lambda *args: torch.storage.TypedStorage._new_shared_cuda(*args),
    "a legacy storage": lambda *args: torch.FloatStorage._new_shared_cuda(*args),
    "a CUDA storage": lambda *args: torch.cuda.FloatStorage._new_shared_cuda(*args),
    "the class by another name": lambda *args: torch.storage.UntypedStorage._new_shared_cuda(*args),
}


def actions() -> list[tuple[str, str, str, str, int]]:
    return [(row.door, row.source, row.target, row.action, row.bytes) for row in devguard.strays() if row.door == "ipc"]


@pytest.mark.parametrize("how", WAYS)
class TestEveryWay:
    def test_unguarded_the_memory_is_opened_on_the_senders_index(self, producer, how):
        torch.cuda.set_device(1)
        assert WAYS[how](*handle(producer.share("cuda:0"))).device.index == 0
        assert actions() == []

    def test_repair_opens_it_for_the_owner_and_it_is_an_alias(self, producer, how):
        shared = handle(producer.share("cuda:0"))
        with guard(1):
            storage = WAYS[how](*shared)
            tensor = torch.empty(0, device="cuda:1").set_(storage, 0, (4,), (1,))
        assert storage.device.index == 1
        assert tensor.tolist() == [0, 1, 2, 3]
        producer.fill(5.0)
        assert tensor.tolist() == [5.0] * 4
        assert actions() == [("ipc", "cuda:0", "cuda:1", "repaired", shared[2])]

    def test_observe_and_warn_record_and_error_refuses(self, producer, how):
        shared = handle(producer.share("cuda:0"))
        with guard(1, mode="observe"):
            assert WAYS[how](*shared).device.index == 0
        with guard(1, mode="warn"), pytest.warns(devguard.StrayDeviceWarning, match="went to cuda:0"):
            assert WAYS[how](*handle(producer.share("cuda:0"))).device.index == 0
        with guard(1, mode="error"), pytest.raises(devguard.StrayDeviceError, match="Open it with the index"):
            WAYS[how](*handle(producer.share("cuda:0")))
        assert [row[3] for row in actions()] == ["observed", "warned", "refused"]

    def test_off_unguarded_allowed_and_the_owners_memory_leave_no_record(self, producer, how):
        with guard(1, mode="off"):
            assert WAYS[how](*handle(producer.share("cuda:0"))).device.index == 0
        with guard(1), devguard.unguarded():
            assert WAYS[how](*handle(producer.share("cuda:0"))).device.index == 0
        with guard(1, mode="error"):
            assert WAYS[how](*handle(producer.share("cuda:1"))).device.index == 1
            devguard.allow("cuda:0")
            assert WAYS[how](*handle(producer.share("cuda:0"))).device.index == 0
        assert actions() == []

    def test_where_the_program_made_the_senders_device_current_it_is_obeyed(self, producer, how):
        """As SGLang's transport does, which then makes a tensor of the storage on that device."""
        with guard(1), torch.cuda.device(0):
            storage = WAYS[how](*handle(producer.share("cuda:0")))
            mapped = torch.empty(0, device="cuda:0").set_(storage, 0, (4,), (1,))
            received = torch.empty(4, device="cuda:1")
            received.copy_(mapped)
        assert received.tolist() == [0, 1, 2, 3]
        assert [row[1:4] for row in actions()] == [("cuda:0", "cuda:0", "kept")]
        with guard(1, mode="error"), torch.cuda.device(0), pytest.raises(devguard.StrayDeviceError, match="itself"):
            WAYS[how](*handle(producer.share("cuda:0")))

    def test_a_copy_is_made_on_request(self, producer, how):
        with devguard.remap(1):
            storage = WAYS[how](*handle(producer.share("cuda:0")))
        assert storage.device.index == 1
        producer.fill(5.0)
        assert torch.empty(0, device="cuda:1").set_(storage, 0, (4,), (1,)).tolist() == [0, 1, 2, 3]


def test_an_early_copy_of_torchs_rebuilding_function_is_covered(producer):
    args = arguments(producer.share("cuda:0"))
    with guard(1):
        tensor = early_rebuild(*args)
    assert (tensor.device.index, tensor.tolist()) == (1, [0, 1, 2, 3])
    assert [row[1:4] for row in actions()] == [("cuda:0", "cuda:1", "repaired")]


@pytest.mark.parametrize("mode", ["repair", "observe", "off"])
def test_a_tensor_of_torch_multiprocessing_is_judged_once(producer, mode):
    message = producer.share("cuda:0")
    with guard(1, mode=mode):
        tensor = pickle.loads(message)
    assert tensor.device.index == (1 if mode == "repair" else 0)
    assert [(row.count, row.action) for row in devguard.strays()] == {
        "repair": [(1, "repaired")],
        "observe": [(1, "observed")],
        "off": [],
    }[mode]


def test_without_peer_access_the_reason_is_recorded(producer, monkeypatch):
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda *pair: False)
    with guard(1):
        assert torch.UntypedStorage._new_shared_cuda(*handle(producer.share("cuda:0"))).device.index == 0
    (row,) = devguard.strays()
    assert (row.action, row.note) == ("observed", row.note)
    assert "no peer access" in row.note


@pytest.mark.parametrize("own", [2, 0])
def test_memory_that_is_open_for_another_owner_is_copied(producer, own):
    shared = handle(producer.share("cuda:0"))
    with guard(1):
        alias = torch.UntypedStorage._new_shared_cuda(*shared)
    with guard(own):
        storage = torch.UntypedStorage._new_shared_cuda(*shared)
    assert (alias.device.index, storage.device.index) == (1, own)
    producer.fill(5.0)
    assert torch.empty(0, device=f"cuda:{own}").set_(storage, 0, (4,), (1,)).tolist() == [0, 1, 2, 3]
    assert "not an alias" in devguard.strays()[-1].note


def test_memory_that_a_program_opened_is_known_to_torch_multiprocessing(producer):
    message = producer.share("cuda:0")
    with guard(1):
        alias = torch.UntypedStorage._new_shared_cuda(*handle(message))
    with guard(2):
        tensor = pickle.loads(producer.again())
    assert (alias.device.index, tensor.device.index, tensor.tolist()) == (1, 2, [0, 1, 2, 3])
    assert "not an alias" in devguard.strays()[-1].note


def test_the_cpu_owner_refuses_in_mode_error(producer):
    with guard("cpu", mode="error"), pytest.raises(devguard.StrayDeviceError, match="copy"):
        torch.UntypedStorage._new_shared_cuda(*handle(producer.share("cuda:0")))


def test_torchs_own_errors_are_raised():
    with guard(1, mode="error"):
        for args in ((), (0,), ("x", b"", 1, 0, b"", 0, b"", False)):
            with pytest.raises((TypeError, RuntimeError)):
                torch.UntypedStorage._new_shared_cuda(*args)
    assert actions() == []


def test_no_context_is_opened_on_the_senders_gpu(producer):
    code = (
        "shared = pickle.loads(data)\n"
        "devguard.{entry}\n"
        "torch.cuda.init()\n"
        "try: print(torch.UntypedStorage._new_shared_cuda(*shared).device, ctx())\n"
        "except devguard.StrayDeviceError: print('refused', ctx())"
    )
    data = pickle.dumps(handle(producer.share("cuda:0")))
    assert run_child(code.format(entry="guard(1).__enter__()"), data, prelude=PRELUDE) == "cuda:1 [1]"
    data = pickle.dumps(handle(producer.share("cuda:0")))
    assert run_child(code.format(entry="guard(1, mode='error').__enter__()"), data) == "refused [1]"


def test_a_thread_that_selected_no_device_is_repaired(producer):
    shared = handle(producer.share("cuda:0"))
    code = (
        "import threading\n"
        "shared = pickle.loads(data); started, entered = threading.Event(), threading.Event(); got = []\n"
        "def work():\n"
        "    started.set(); entered.wait(); torch.cuda.init()\n"
        "    got.append(str(torch.UntypedStorage._new_shared_cuda(*shared).device))\n"
        "thread = threading.Thread(target=work); thread.start(); started.wait()\n"
        "devguard.install(device=1); entered.set(); thread.join()\n"
        "print(got, ctx())"
    )
    assert run_child(code, pickle.dumps(shared)) == "['cuda:1'] [1]"


def test_uninstall_restores_torchs_function():
    assert "_new_shared_cuda" in vars(torch.UntypedStorage)
    assert torch.UntypedStorage._new_shared_cuda is not ORIGINAL
    assert devguard.uninstall() == []
    assert "_new_shared_cuda" not in vars(torch.UntypedStorage)
    assert torch.UntypedStorage._new_shared_cuda is ORIGINAL


def test_early_copies_are_listed():
    assert f"{__name__}.ORIGINAL" in devguard.status()["doors"]["ipc"]["early_copies"]


def test_threads_do_not_take_each_others_judgement(producer):
    shared = [handle(producer.share("cuda:0")) for _ in range(4)]
    found = []

    def work(args):
        with guard(1, mode="error"):
            try:
                found.append(torch.UntypedStorage._new_shared_cuda(*args))
            except devguard.StrayDeviceError:
                found.append("refused")

    threads = [threading.Thread(target=work, args=(args,)) for args in shared]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["refused"] * 4
    assert reductions.rebuild_cuda_tensor is not None
