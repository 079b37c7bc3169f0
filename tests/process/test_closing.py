"""Doors that open and close while other threads load, save and pickle: no error, and right values."""

from __future__ import annotations

import copy
import io
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
import torch.multiprocessing

import devguard
from tests.helpers import tagging
from tests.helpers.programs import run_child
from tests.helpers.torch_state import changed, everything_in_torch, relay_something

CYCLES = 120
VALUE = {"a": torch.arange(6.0), "b": torch.arange(4)[1:]}
EXPECTED = {"a": [0, 1, 2, 3, 4, 5], "b": [1, 2, 3]}


@pytest.fixture(autouse=True)
def _switch_often() -> Iterator[None]:
    """Make Python switch threads after a few instructions, so that a loop of torch is interrupted."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)
    devguard.uninstall()


def save(*, legacy: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(VALUE, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


PICKLED, ZIP, LEGACY = pickle.dumps(VALUE), save(), save(legacy=True)
TAGGED = tagging.dumps(VALUE)


def load_tagged() -> Any:
    try:
        return pickle.loads(TAGGED)
    except RuntimeError as error:
        assert tagging.REFUSAL in str(error)  # noqa: PT017 - the doors are closed: torch's own error on a CPU build
        return VALUE


def relay() -> Any:
    """Pass a received value on, and read it again."""
    return pickle.loads(pickle.dumps(load_tagged()))


LOOPS: dict[str, Callable[[], Any]] = {
    "unpickle": lambda: pickle.loads(PICKLED),
    "pickle": lambda: pickle.loads(pickle.dumps(VALUE)),
    "load": lambda: torch.load(io.BytesIO(ZIP)),
    "load with a dictionary": lambda: torch.load(io.BytesIO(ZIP), map_location={}),
    "load with a function": lambda: torch.load(io.BytesIO(ZIP), map_location=lambda storage, tag: None),
    "load legacy": lambda: torch.load(io.BytesIO(LEGACY)),
    "save": lambda: torch.load(io.BytesIO(save())),
    "save legacy": lambda: torch.load(io.BytesIO(save(legacy=True))),
    "copy": lambda: copy.deepcopy(VALUE),
    "move": lambda: {name: value.to("cpu").cpu() for name, value in VALUE.items()},
    "load tagged": load_tagged,
    "queue": lambda: pickle.loads(ForkingPickler.dumps(VALUE)),  # read, because a message keeps a file open until then
}


def run(work: Callable[[], Any], owner: str | None, cycle: Callable[[], None]) -> list[BaseException]:
    """Repeat `work` in three threads while this thread repeats `cycle`; return what `work` raised."""
    problems: list[BaseException] = []
    stop, started = threading.Event(), threading.Barrier(4)

    def repeat() -> None:
        try:
            with devguard.guard(owner) if owner else devguard.unguarded():
                started.wait()
                while not stop.is_set():
                    value = work()
                    assert {name: tensor.tolist() for name, tensor in value.items()} == EXPECTED
        except BaseException as error:  # noqa: BLE001 - the test shows it
            problems.append(error)

    threads = [threading.Thread(target=repeat) for _ in range(3)]
    for thread in threads:
        thread.start()
    started.wait()
    for _ in range(CYCLES):
        cycle()
    stop.set()
    for thread in threads:
        thread.join()
    return problems


def open_and_close() -> None:
    devguard.install("repair", "cpu")
    relay_something()
    devguard.uninstall()


@pytest.mark.parametrize("owner", ["cpu", None], ids=["guarded", "unguarded"])
@pytest.mark.parametrize("name", LOOPS)
def test_no_load_fails_while_doors_open_and_close(name: str, owner: str | None) -> None:
    assert run(LOOPS[name], owner, open_and_close) == []


def test_a_relay_goes_on_while_doors_open_and_close() -> None:
    with tagging.landings():  # the tag is understood all the time
        assert run(relay, "cpu", open_and_close) == []


@pytest.mark.parametrize("during", ["load", "save"])
def test_torchs_loop_over_its_registry_goes_on_where_the_doors_close_in_its_middle(during: str) -> None:
    """Another thread closes the doors while torch calls the row after those that come first."""
    closed = []

    def close(*args: Any) -> None:
        thread = threading.Thread(target=lambda: closed.append(devguard.uninstall()))
        thread.start()
        thread.join()

    ignore: Callable[..., Any] = lambda *args: None  # noqa: E731
    registry = torch.serialization._package_registry
    torch.serialization.register_package(5.5, *((ignore, close) if during == "load" else (close, ignore)))  # type: ignore[arg-type]
    row = next(row for row in registry if row[0] == 5.5)
    try:
        devguard.install("repair", "cpu")
        relay_something()
        value = torch.load(io.BytesIO(ZIP)) if during == "load" else torch.load(io.BytesIO(save()))
    finally:
        registry[:] = [other for other in registry if other is not row]
    assert {name: tensor.tolist() for name, tensor in value.items()} == EXPECTED
    assert closed
    assert not any(closed)


def test_many_cycles_leave_torch_as_it_was() -> None:
    before = everything_in_torch()
    for _ in range(20):
        open_and_close()
    after = everything_in_torch()
    assert changed(before, after) == set()
    assert {name for name in set(after) - set(before) if not name[1].startswith("__")} == set()


GROWTH = """
import gc
from multiprocessing.reduction import ForkingPickler
from wrapt import importer
from devguard.doors.arrivals import relayed_tags
for name in [name for name in sys.modules if name.startswith('torch.package')]:
    del sys.modules[name]  # as in a release of torch that imports it on demand
def cycle():
    devguard.install('repair', 'cpu')
    relayed_tags.keep(torch.zeros(1).untyped_storage(), 'cuda:0')
    devguard.uninstall()
def sizes():
    gc.collect()
    hooks = sum(len(value or ()) for value in importer._post_import_hooks.values())
    tables = torch.serialization._package_registry, torch.cuda._queued_calls, ForkingPickler._extra_reducers
    return [hooks, *map(len, tables)], len(gc.get_objects())
for _ in range(5): cycle()
first, objects = sizes()
for _ in range(50): cycle()
last, more = sizes()
print(first == last, more - objects < 50)
"""


def test_many_cycles_leave_nothing_behind() -> None:
    assert run_child(GROWTH) == "True True"
