"""Placement on simulated GPUs: devices, contexts, memory, copies, streams and errors, under the real torch."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Callable

import pytest

from tests.helpers.simulated import ROOT, Finished, sim_environment

Run = Callable[..., Finished]
PRELUDE = """
import contextlib, gc, io, json, os, pickle, sys, threading
import torch
from devguard import simgpu

def me():
    return next(p for p in simgpu.state() if p.pid == os.getpid())

def contexts():
    return [d.index for d in me().devices if d.context]

def held():
    return [d.bytes >> 20 for d in me().devices]

MIB = 1 << 20
"""


def python(code: str) -> str:
    return PRELUDE + textwrap.dedent(code)


def test_devices_are_counted_and_described_without_a_context(run_simulated: Run) -> None:
    done = run_simulated(
        python("""
        assert simgpu.active()
        assert torch.version.cuda and torch.cuda.is_available()
        assert torch.cuda.device_count() == 4
        assert torch.cuda._device_count_nvml() == 4
        assert not torch.cuda.is_initialized()
        torch.cuda.init()
        uuids = set()
        for i in range(4):
            assert torch.cuda.get_device_name(i) == f"Simulated GPU {i}"
            assert torch.cuda.get_device_capability(i) == (9, 0)
            properties = torch.cuda.get_device_properties(i)
            assert properties.total_memory == 8 << 30
            uuids.add(str(properties.uuid))
        assert len(uuids) == 4
        assert torch.cuda.current_device() == 0
        assert not any(torch._C._cuda_hasPrimaryContext(i) for i in range(4))
        assert contexts() == [], contexts()
        """),
        gpus=4,
    )
    assert not done.me.alive
    assert done.me.name == f"{sys.executable.rpartition('/')[2]} -c"
    assert [d.context for d in done.me.devices] == [False] * 4
    assert not [line for line in done.log if "ctx_create" in line]


def test_allocations_copies_and_fills_have_the_right_device_and_values(run_simulated: Run) -> None:
    done = run_simulated(
        python("""
        x = torch.empty(1000, 1000, device="cuda:1")
        assert x.device == torch.device("cuda:1") and contexts() == [1] and held() == [0, 20, 0, 0], held()
        assert torch._C._cuda_hasPrimaryContext(1) and not torch._C._cuda_hasPrimaryContext(0)

        host = torch.arange(24, dtype=torch.float32).reshape(4, 6)
        y = host.to("cuda:2")
        assert torch.equal(y.cpu(), host) and contexts() == [1, 2] and y[2, 3].item() == 15.0
        z = y.to("cuda:3")  # GPU to GPU
        assert z.device.index == 3 and torch.equal(z.cpu(), host)
        z.copy_(host + 1, non_blocking=True)
        assert torch.equal(z.to("cuda:1").cpu(), host + 1) and torch.equal(y.cpu(), host)

        for name in "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool".split():
            dtype = getattr(torch, name)
            for made, wanted in (
                (torch.zeros(77, device="cuda:3", dtype=dtype), torch.zeros(77, dtype=dtype)),
                (torch.ones(5000, device="cuda:3", dtype=dtype), torch.ones(5000, dtype=dtype)),
                (torch.full((3,), 1, device="cuda:3", dtype=dtype), torch.full((3,), 1, dtype=dtype)),
            ):
                assert torch.equal(made.cpu(), wanted), dtype

        assert torch.cuda.memory_allocated(0) == 0 and torch.cuda.memory_allocated(1) >= 4_000_000
        m = torch.nn.Linear(8, 8).to("cuda:1")
        o = m(torch.randn(2, 8).to("cuda:1"))
        o.sum().backward()
        assert o.device.index == 1 and m.weight.grad.device.index == 1
        print(json.dumps(held()), flush=True)
        # Autograd's threads may still be starting. A thread that requests the GIL while Python shuts down is ended
        # inside C++, and takes the process with it: a race of torch itself, on a busy machine.
        os._exit(0)
        """),
        gpus=4,
    )
    devices = done.me.devices
    assert [d.bytes >> 20 for d in devices] == done.result  # The memory held at the end stays readable.
    assert devices[1].bytes >= 20 << 20
    assert devices[1].allocations >= 1
    assert all(d.peak_bytes >= d.bytes for d in devices)
    assert devices[1].launches > 0
    assert [d.ipc_opens for d in devices] == [0] * 4


def test_freed_memory_is_released_and_the_peak_is_kept(run_simulated: Run) -> None:
    done = run_simulated(
        python("""
        x = torch.empty(100 * MIB, dtype=torch.uint8, device="cuda:1")
        assert held() == [0, 100]
        del x
        assert held() == [0, 100]  # the caching allocator keeps it
        torch.cuda.empty_cache()
        assert held() == [0, 0]
        """)
    )
    assert done.me.devices[1].bytes == 0
    assert done.me.devices[1].peak_bytes == 100 << 20
    assert done.me.devices[1].context


def test_the_current_device_is_per_thread_and_selecting_one_opens_its_context(run_simulated: Run) -> None:
    run_simulated(
        python("""
        torch.cuda.set_device(3)
        assert torch.cuda.current_device() == 3 and contexts() == [3]
        assert torch.empty(1, device="cuda").device.index == 3
        with torch.cuda.device(2):
            assert torch.cuda.current_device() == 2
        assert torch.cuda.current_device() == 3 and 0 not in contexts()
        seen = []
        t = threading.Thread(target=lambda: seen.append(torch.cuda.current_device()))
        t.start(); t.join()
        assert seen == [0]
        try:
            torch.cuda.set_device(7)
        except Exception as error:
            assert "invalid device ordinal" in str(error), error
        else:
            raise AssertionError("device 7 of 4 was accepted")
        assert 0 not in contexts(), contexts()
        """),
        gpus=4,
    )


def test_streams_events_pinned_memory_and_graphs(run_simulated: Run) -> None:
    done = run_simulated(
        python("""
        y = torch.ones(4, 6).to("cuda:2")
        s = torch.cuda.Stream(device=2)
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        assert contexts() == [2], contexts()
        with torch.cuda.stream(s):  # torch itself opens a context on GPU 0 when it goes back
            assert torch.cuda.current_device() == 2
            a.record(); y2 = y + 1; b.record()
        b.synchronize(); s.synchronize(); torch.cuda.synchronize(2)
        assert s.device.index == 2 and a.elapsed_time(b) >= 0 and y2.device.index == 2 and b.query() and s.query()
        other = torch.cuda.Event()
        other.record(torch.cuda.Stream(device=1))
        try:
            other.record(s)  # an event of device 1 on a stream of device 2
        except Exception as error:
            assert "device" in str(error) or "handle" in str(error), error
        else:
            raise AssertionError("an event was recorded on another device's stream")

        p = torch.ones(10).pin_memory()
        assert p.is_pinned() and not torch.ones(10).is_pinned()
        assert torch.equal(p.to("cuda:2", non_blocking=True).cpu(), p)

        with torch.cuda.device(1):
            g, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
            static = torch.empty(2, 8, device="cuda:1")
            with torch.cuda.graph(g, stream=stream):
                out = static + 1
            g.replay()
        assert out.device.index == 1
        assert 0 in contexts()  # pin_memory uses the current device, 0 by default
        """),
        gpus=3,
    )
    assert [line for line in done.log if line.split()[2:4] == ["1", "graphLaunch"]]


def test_out_of_memory_raises_torchs_error_and_counts_all_processes(run_simulated: Run) -> None:
    done = run_simulated(
        python("""
        import subprocess
        free, total = torch.cuda.mem_get_info(1)
        assert total == 1 << 30 and free == (1 << 30) - 256 * MIB  # its context
        x = torch.empty(512 * MIB, dtype=torch.uint8, device="cuda:1")
        code = '''
        import torch
        assert torch.cuda.mem_get_info(0)[0] == (1 << 30) - (256 << 20)
        try:
            torch.empty(64 << 20, dtype=torch.uint8, device="cuda:1")  # no room for a second context and this
        except torch.cuda.OutOfMemoryError as error:
            print("refused")
        '''
        out = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True).stdout
        assert out == "refused\\n", out
        try:
            torch.empty(10 << 30, device="cuda:1")
        except torch.cuda.OutOfMemoryError as error:
            assert "CUDA out of memory" in str(error) and "GPU 1" in str(error)
        else:
            raise AssertionError("40 GiB were allocated")
        """),
        memory=1 << 30,
    )
    assert len(done.state) == 2
    assert done.state[1].devices[1].bytes == 0


def test_a_child_forked_after_initialisation_gets_errors_and_one_forked_before_does_not(run_simulated: Run) -> None:
    run_simulated(
        python("""
        import ctypes
        pid = os.fork()
        if not pid:
            assert torch.ones(3).to("cuda:1").sum and contexts() == [1]
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0

        x = torch.empty(4, device="cuda:1")
        pid = os.fork()
        if not pid:
            try:
                torch.empty(1, device="cuda:0")
            except RuntimeError as error:
                assert "forked subprocess" in str(error), error
            else:
                os._exit(1)
            count = ctypes.c_int(5)
            driver = ctypes.CDLL("libcuda.so.1")
            os._exit(0 if driver.cuDeviceGetCount(ctypes.byref(count)) == 3 and driver.cuInit(0) == 3 else 2)
        assert os.waitpid(pid, 0)[1] == 0
        pid = os.fork()
        if not pid:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            ctypes.string_at(x.data_ptr(), 1)  # the host reads device memory
            os._exit(0)
        assert os.waitpid(pid, 0)[1] & 127 == 11
        assert contexts() == [1]
        """)
    )


def test_forked_siblings_that_initialise_at_once_get_a_record_each(run_simulated: Run) -> None:
    done = run_simulated(
        python("""
        waits, go = os.pipe()
        children = []
        for _ in range(12):
            children.append(os.fork())
            if not children[-1]:
                os.read(waits, 1)
                torch.ones(3).to("cuda:1")
                os._exit(0)
        os.write(go, bytes(12))
        assert [os.waitpid(child, 0)[1] for child in children] == [0] * 12
        """)
    )
    assert len({process.pid for process in done.state}) == 12


def test_the_context_of_a_threads_last_work_stays_bound_to_the_thread(run_simulated: Run) -> None:
    """devguard relies on this when a thread ends, to find the device it worked on (``accelerator.bound_device``)."""
    run_simulated(
        python("""
        from devguard.support import accelerator
        def on_thread(work):
            seen = []
            t = threading.Thread(target=lambda: (work(), seen.append(accelerator.bound_device())))
            t.start(); t.join()
            return seen[0]
        assert accelerator.bound_device() is None and not torch.cuda.is_initialized()
        torch.cuda.set_device(1)
        assert accelerator.bound_device() == 1
        assert on_thread(lambda: torch.cuda.current_device()) is None  # A query opens no context.
        # The thread starts on device 0, which has no context.
        assert on_thread(lambda: torch.ones(2, device="cuda:1")) == 1
        assert contexts() == [1]
        assert on_thread(lambda: torch.ones(2, device="cuda")) == 0
        assert on_thread(lambda: torch.cuda.set_device(1)) == 1
        assert accelerator.bound_device() == 1
        """)
    )


def test_the_driver_returns_not_initialised_until_it_is_initialised(run_simulated: Run) -> None:
    done = run_simulated(
        python("""
        import ctypes
        driver = ctypes.CDLL("libcuda.so.1")
        count, active, flags, context = ctypes.c_int(), ctypes.c_int(), ctypes.c_uint(), ctypes.c_void_p()
        def query():
            return (driver.cuDeviceGetCount(ctypes.byref(count)),
                    driver.cuDevicePrimaryCtxGetState(1, ctypes.byref(flags), ctypes.byref(active)),
                    driver.cuCtxGetCurrent(ctypes.byref(context)))
        assert query() == (3, 3, 3)  # torch is only imported
        assert simgpu.state() == ()
        assert torch.cuda._device_count_nvml() == 2 and query() == (3, 3, 3)  # NVML is not the driver
        torch.cuda.init()
        assert query() == (0, 0, 0) and count.value == 2 and not active.value and not context.value
        torch.cuda.set_device(1)
        assert query() == (0, 0, 0) and active.value == 1 and context.value
        seen = []
        t = threading.Thread(target=lambda: (driver.cuCtxGetCurrent(ctypes.byref(context)), seen.append(context.value)))
        t.start(); t.join()
        assert seen == [None]  # a fresh thread has no context bound
        """)
    )
    assert len(done.state) == 1


@pytest.mark.parametrize(
    ("visible", "count", "physical"),
    [
        ("3,1", 2, 3),
        ("GPU-64657667-7561-7264-0000-000000000002", 1, 2),
        ("2, 9, 1", 1, 2),
        ("", 0, None),
        ("1,1", 0, None),
    ],
)
def test_cuda_visible_devices_selects_the_gpus(
    run_simulated: Run, visible: str, count: int, physical: int | None
) -> None:
    done = run_simulated(
        f"""
        import os
        os.environ["CUDA_VISIBLE_DEVICES"] = {visible!r}
        import torch
        assert torch.cuda.device_count() == {count}, torch.cuda.device_count()
        if {count}:
            torch.empty(1, device="cuda:0")
            assert torch.cuda.get_device_name(0) == "Simulated GPU {physical}"
            assert torch.cuda._device_count_nvml() == {count}
        """,
        gpus=4,
    )
    contexts = [d.index for p in done.state for d in p.devices if d.context]
    assert contexts == ([] if physical is None else [physical])


def test_a_pickle_keeps_the_senders_device_and_planted_bugs_show(run_simulated: Run) -> None:
    """The bugs that devguard repairs must be visible without devguard."""
    bugs = {
        "pickle": "t = pickle.loads(blob)\nassert t.device.index == 0, t.device",
        "right": "t = pickle.loads(blob).to('cuda:1')",
        "current": "t = torch.empty(2, device='cuda')",
        "load": "t = torch.load(io.BytesIO(saved), weights_only=True)",
        "placed": "t = torch.load(io.BytesIO(saved), map_location='cuda:1', weights_only=True)",
    }
    code = """
    t = torch.tensor([1.0, 2.0]).to("cuda:0")
    blob, buffer = pickle.dumps(t), io.BytesIO()
    torch.save(t, buffer)
    sys.stdout.buffer.write(pickle.dumps((blob, buffer.getvalue())))
    """
    env = sim_environment(2)
    raw = subprocess.run(
        [sys.executable, "-c", python(code)], env=env, cwd=ROOT, stdout=subprocess.PIPE, check=True
    ).stdout
    blob, saved = pickle.loads(raw)
    receive = """
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for name, bug in BUGS.items():
        pid = os.fork()
        if not pid:
            torch.cuda.set_device(1)
            scope = dict(globals())
            exec(bug, scope)
            assert scope["t"].cpu().tolist() == [1.0, 2.0] or name == "current"
            print(json.dumps([name, contexts(), held()]), flush=True)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0, name
    """
    values = f"BUGS, blob, saved = {bugs!r}, {blob!r}, {saved!r}\n"
    done = run_simulated(python("") + values + textwrap.dedent(receive))
    seen = {name: (contexts, held) for name, contexts, held in map(json.loads, done.stdout.splitlines())}
    assert seen == {
        "pickle": ([0, 1], [2, 0]),
        "right": ([0, 1], [2, 2]),
        "current": ([1], [0, 2]),
        "load": ([0, 1], [2, 0]),
        "placed": ([1], [0, 2]),
    }


def test_expandable_segments_and_the_async_allocator_work(run_simulated: Run) -> None:
    for setting in ("expandable_segments:True", "backend:cudaMallocAsync"):
        done = run_simulated(
            f"import os; os.environ['PYTORCH_CUDA_ALLOC_CONF'] = {setting!r}\n"
            + python("""
            x = torch.full((3 * MIB,), 5, dtype=torch.uint8).to("cuda:1")
            y = torch.full((30 * MIB,), 6, dtype=torch.uint8).to("cuda:1")
            assert int(x.cpu()[-1]) == 5 and int(y.cpu()[-1]) == 6 and int(y.cpu()[0]) == 6
            assert held()[0] == 0 and held()[1] >= 33, held()
            """)
        )
        assert done.me.devices[1].peak_bytes >= 33 << 20


def test_a_launch_is_counted_and_logged_on_its_device(run_simulated: Run) -> None:
    done = run_simulated("import torch; x = torch.empty(4, device='cuda:1'); x + 1")
    assert [d.launches for d in done.me.devices] == [0, 1]
    launches = [line.split() for line in done.log if line.split()[3] == "launch"]
    assert [fields[2] for fields in launches] == ["1"]
    assert "add" in launches[0][-1].lower()
