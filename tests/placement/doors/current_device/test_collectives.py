"""The door ``collectives``: which device a barrier, a group and an object collective take when none is named.

On simulated GPUs an NCCL group of one process runs as far as the choice of its device and the context that this opens.
"""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

import devguard
from devguard import guard
from devguard.doors.current_device import collectives
from tests.helpers.programs import run_child

PRELUDE = """
import json, os, sys, tempfile, warnings, _thread, threading
import torch, torch.distributed as dist, devguard
from devguard import guard
warnings.filterwarnings("ignore", "barrier..: using the device|No device id is provided")
def ctx(): return [device.index for device in devguard.contexts()]
def rows():
    ours = [s for s in devguard.strays() if s.door == "collectives"]
    return [[s.door, s.source, s.target, s.action, s.count] for s in ours]
def join(backend="nccl", **options):
    store = "file://" + tempfile.mktemp()
    dist.init_process_group(backend, init_method=store, rank=0, world_size=1, **options)
def done(value):
    print(json.dumps(value), flush=True)
    os._exit(0)  # does not wait for NCCL's threads
"""


def child(code: str) -> Any:
    """Run `code` in a fresh process that is the only rank of its job."""
    # torch 2.15: 0 selects the NCCL group that does not use NCCL until it communicates.
    environment = {"TORCH_DIST_USE_NCCL2": "0"}
    output = run_child(code, prelude=PRELUDE, options=["-W", "error"], environment=environment)
    return json.loads(output.splitlines()[-1])


class TestBarrier:
    """torch guesses cuda:0 for the only rank, 0."""

    def test_unguarded_a_barrier_opens_device_0(self):
        assert child("torch.cuda.set_device(1); join(); dist.barrier(); done(ctx())") == [0, 1]

    def test_guarded_a_barrier_uses_the_owner(self):
        code = (
            "join()\nwith guard(1):\n    dist.barrier()\ndone([ctx(), rows(), str(devguard.strays()[0].site.source)])"
        )
        assert child(code)[:2] == [[1], [["collectives", "cuda:0", "cuda:1", "repaired", 1]]]

    def test_with_a_closed_door_a_barrier_opens_device_0(self):
        assert child("join()\nwith guard(1):\n    devguard.uninstall(); dist.barrier()\ndone(ctx())") == [0, 1]

    def test_each_group_follows_the_mode(self):
        code = (
            "join(); contexts = []\n"
            "with guard(1):\n"
            "    dist.barrier()\n"
            "    group = dist.new_group([0]); contexts.append(ctx())\n"
            "    dist.barrier(group).__class__, dist.barrier(dist.new_group([0]), async_op=True)\n"
            "with guard(1, mode='error'):\n"
            "    try: dist.barrier(group=dist.new_group([0]))\n"
            "    except devguard.StrayDeviceError as error: contexts.append([str(error), ctx()])\n"
            "with guard(1, mode='warn'), warnings.catch_warnings(record=True) as seen:\n"
            "    warnings.simplefilter('always'); dist.barrier(dist.new_group([0]))\n"
            "    contexts.append([w.category.__name__ for w in seen if w.category is not UserWarning])\n"
            "with guard(1, mode='observe'): dist.barrier(dist.new_group([0]))\n"
            "contexts.append(ctx())\n"
            "done([contexts, rows()])"
        )
        (created, (message, refused), warned, observed), strays = child(code)
        assert (created, refused, warned, observed) == ([1], [1], ["StrayDeviceWarning"], [0, 1])
        assert "work was about to go to cuda:0, but this scope owns cuda:1" in message
        assert "device_ids" in message
        assert [row[3:] for row in strays] == [
            ["repaired", 1],
            ["repaired", 2],
            ["refused", 1],
            ["warned", 1],
            ["observed", 1],
        ]

    def test_a_barrier_is_no_stray_if_torch_guesses_nothing_or_guesses_right(self):
        code = (
            "join()\n"
            "with guard(0, mode='error'): dist.barrier()\n"
            "with guard(1, mode='error'):\n"
            "    group = dist.new_group([0]); dist.barrier(group, device_ids=[1])\n"
            "    dist.barrier(group)\n"  # the group has communicated
            "    hosts = dist.new_group([0], backend='gloo'); dist.barrier(hosts)\n"
            "with guard(1):\n"
            "    dist.barrier(group)\n"
            "group = dist.new_group([0])\n"
            "with guard(1, doors={'collectives': 'off'}): dist.barrier(group)\n"
            "group = dist.new_group([0])\n"
            "with guard(1), devguard.unguarded(): dist.barrier(group)\n"
            "dist.barrier(dist.new_group([0]))\n"
            "devguard.allow('cuda:0')\n"
            "with guard(1, mode='error'): dist.barrier(dist.new_group([0]))\n"
            "done(rows())"
        )
        assert child(code) == []

    def test_a_group_that_is_bound_to_a_device_keeps_it(self):
        code = (
            "join('gloo'); dist.group.WORLD.bound_device_id = torch.device('cuda:2')\n"
            "from devguard.doors.current_device import collectives\n"
            "from torch.distributed import distributed_c10d as c10d\n"
            "with guard(1): done(collectives._find_unconnected(c10d, dist.group.WORLD) is None)"
        )
        assert child(code) is True

    def test_a_device_that_the_program_names_is_used_and_recorded(self):
        code = (
            "join()\n"
            "with guard(1):\n"
            "    group = dist.new_group([0]); dist.barrier(group, device_ids=[2]); found = ctx()\n"
            "with guard(1, mode='error'):\n"
            "    try: dist.barrier(device_ids=[2])\n"
            "    except devguard.StrayDeviceError: done([found, rows()])\n"
        )
        found, strays = child(code)
        assert 2 in found
        assert 0 not in found
        assert [row[1:4] for row in strays] == [["cuda:2", "cuda:2", "kept"], ["cuda:2", "cuda:2", "refused"]]

    def test_under_the_cpu_owner_a_barrier_is_recorded_or_refused(self):
        code = (
            "join()\n"
            "with guard('cpu', mode='error'):\n"
            "    try: dist.barrier()\n"
            "    except devguard.StrayDeviceError: found = ctx()\n"
            "with guard('cpu'): dist.barrier()\n"
            "done([found, rows()])"
        )
        found, strays = child(code)
        assert found == []
        assert [row[3] for row in strays] == ["refused", "observed"]

    def test_torchs_own_errors_are_raised(self):
        with guard(1):
            with pytest.raises(ValueError, match=r"[Dd]efault process group"):
                dist.barrier()
            with pytest.raises(TypeError):
                dist.barrier(nothing=1)


class TestHostGroups:
    @pytest.fixture(params=["gloo", "fake"])
    def _group(self, request, tmp_path) -> Iterator[None]:
        if request.param == "fake":
            from torch.testing._internal.distributed.fake_pg import FakeStore

            dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
        else:
            dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        yield
        dist.destroy_process_group()

    @pytest.mark.usefixtures("_group")
    @pytest.mark.filterwarnings("ignore:.*using the device under current:UserWarning")
    @pytest.mark.filterwarnings("ignore:No device id is provided:UserWarning")
    def test_barriers_of_host_groups_are_left_alone(self):
        with guard(2, mode="error"), devguard.no_strays():
            dist.barrier()
            dist.barrier(dist.new_group([0, 1]) if dist.get_world_size() > 1 else None)


class TestObjectCollectives:
    GATHER = (
        "join()\n"
        "def gather():\n"
        "    try: dist.all_gather_object([None], 'object')\n"
        "    except (EOFError, RuntimeError): pass\n"  # the group has no peer to send to
        "def elsewhere():\n"  # on a thread that has chosen no device
        "    ended = threading.Lock(); ended.acquire()\n"
        "    def work():\n"
        "        try: gather()\n"
        "        finally: ended.release()\n"
        "    _thread.start_new_thread(work, ()); ended.acquire()\n"
    )

    def test_unguarded_a_thread_that_chose_no_device_opens_device_0(self):
        assert child(self.GATHER + "torch.cuda.set_device(1); elsewhere(); done(ctx())") == [0, 1]

    def test_under_install_such_a_thread_uses_the_owner(self):
        code = "devguard.install(device=1); elsewhere(); done([ctx(), rows()])"
        found, strays = child(self.GATHER + code)
        assert found == [1]
        assert [row[:4] for row in strays] == [["collectives", "cuda:0", "cuda:1", "repaired"]]

    def test_inside_a_guard_nothing_is_repaired(self):
        code = "\nwith guard(1, mode='error'): gather()\ndone([ctx(), rows()])"
        assert child(self.GATHER + code) == [[1], []]

    def test_observe_records_and_opens_device_0(self):
        code = "devguard.install(device=1, mode='observe'); elsewhere(); done([ctx(), rows()[0][:4]])"
        assert child(self.GATHER + code) == [[0, 1], ["collectives", "cuda:0", "cuda:0", "observed"]]

    def test_error_mode_refuses_before_device_0_is_opened(self):
        code = (
            "devguard.install(device=1, mode='error')\n"
            "sys.unraisablehook = lambda raised: None\n"
            "elsewhere(); done([ctx(), rows()[0][:4]])"
        )
        assert child(self.GATHER + code) == [[1], ["collectives", "cuda:0", "cuda:0", "refused"]]

    def test_a_device_that_the_program_chose_is_used(self):
        code = (
            "with guard(1), torch.cuda.device(2):\n"
            "    gather()\n"
            "from torch.distributed import distributed_c10d as c10d\n"
            "with guard(1), torch.cuda.device(2): done([ctx(), rows(), c10d._get_object_coll_device()])"
        )
        assert child(self.GATHER + code) == [[1, 2], [], "cuda"]


def guessed(opts: Any) -> Any:
    """Return the device that torch 2.15 guesses."""
    group = opts.process_group
    if group is not None and group.bound_device_id is not None:
        return group.bound_device_id
    device = torch.device("cuda", opts.group_rank % torch.cuda.device_count())
    if group is not None:
        group.bound_device_id = device
    return device


class TestGroupsThatConnectAtOnce:
    @pytest.fixture(autouse=True)
    def _torch_2_15(self, monkeypatch):
        monkeypatch.delenv("LOCAL_RANK", raising=False)
        if "_nccl2_device" not in vars(c10d):
            guessed.__module__ = c10d.__name__
            monkeypatch.setattr(c10d, "_nccl2_device", guessed, raising=False)
        yield
        devguard.uninstall()

    def opts(self, bound: Any = None, rank: int = 2) -> Any:
        group = types.SimpleNamespace(bound_device_id=bound)
        return types.SimpleNamespace(
            process_group=group, group_rank=rank, global_ranks_in_group=[], enable_reconfigure=False
        )

    def test_a_new_group_gets_the_owner(self):
        opts = self.opts()
        assert c10d._nccl2_device(opts).index == 2
        opts = self.opts()
        with guard(1):
            assert c10d._nccl2_device(opts) == opts.process_group.bound_device_id == torch.device("cuda:1")
        (stray,) = devguard.strays()
        assert (stray.door, stray.source, stray.target, stray.action) == ("collectives", "cuda:2", "cuda:1", "repaired")

    def test_a_group_keeps_a_bound_device_and_a_right_guess(self):
        with guard(2, mode="error"):
            assert c10d._nccl2_device(self.opts()).index == 2
        with guard(1, mode="error"):
            assert c10d._nccl2_device(self.opts(bound=torch.device("cuda:3"))).index == 3
        assert devguard.strays() == ()

    def test_observe_and_off_keep_the_guess_and_error_refuses(self):
        for mode in ("observe", "off"):
            opts = self.opts()
            with guard(1, mode=mode):
                assert c10d._nccl2_device(opts) == opts.process_group.bound_device_id == torch.device("cuda:2")
        opts = self.opts()
        with guard(1, mode="error"), pytest.raises(devguard.StrayDeviceError, match="device_id="):
            c10d._nccl2_device(opts)
        assert opts.process_group.bound_device_id is None
        assert [stray.action for stray in devguard.strays()] == ["observed", "refused"]


class TestPatches:
    def test_uninstall_restores_exactly_the_originals(self):
        names = ("barrier", "_get_object_coll_device", "_nccl2_device")
        before = [vars(c10d).get(name) for name in names]
        devguard.install(device=1)
        assert dist.barrier is c10d.barrier is not before[0]
        assert (dist.barrier.__module__, dist.barrier.__qualname__) == (before[0].__module__, before[0].__qualname__)
        assert "torch.distributed.barrier" in devguard.status()["doors"]["collectives"]["watched"]
        assert devguard.uninstall() == []
        assert [vars(c10d).get(name) for name in names] == before
        assert dist.barrier is before[0]

    def test_a_torch_with_another_barrier_keeps_the_door_closed_and_is_a_problem_in_the_status(self, monkeypatch):
        def barrier(gpu): ...

        monkeypatch.setattr(c10d, "barrier", barrier)
        devguard.install(device=1)
        row = devguard.status()["doors"]["collectives"]
        assert (row["open"], "(gpu)" in row["problem"]) == (False, True)
        devguard.uninstall()
        assert c10d.barrier is barrier

    def test_a_torch_without_distributed_has_nothing_to_watch(self, monkeypatch):
        monkeypatch.setattr(dist, "is_available", lambda: False)
        collectives.install()
        assert collectives.status()["watched"] == []
        assert collectives.uninstall() == []
