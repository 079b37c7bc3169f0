"""Tests of the records of programs that open contexts on simulated GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.simulated import POSSIBLE, ROOT, Finished
from tests.tracing.conftest import Traced

pytestmark = pytest.mark.skipif(not POSSIBLE, reason="simulated GPUs exist for Linux on x86-64 only")
Trace = Callable[..., Traced]

# Finds cudaSetDevice in the libcudart that torch has loaded.
RUNTIME = """
import ctypes, sys, torch
torch.cuda.device_count()
path = next(line.split()[-1] for line in open("/proc/self/maps") if "libcudart" in line)
set_device = ctypes.cast(ctypes.CDLL(path).cudaSetDevice, ctypes.c_void_p)
"""

NATIVE = r"""
#define _GNU_SOURCE
#include <pthread.h>
#include <unistd.h>
struct work { int (*set_device)(int); int device, error; };
static void *watch(void *work_)
{
    struct work *work = work_;
    pthread_setname_np(pthread_self(), "watchdog");
    work->error = work->set_device(work->device);
    return 0;
}
int on_native_thread(int (*set_device)(int), int device)
{
    struct work work = { set_device, device, -1 };
    pthread_t thread;
    pthread_create(&thread, 0, watch, &work);
    pthread_join(thread, 0);
    return work.error;
}
/* hold() keeps the GIL until open_and_release(), in a thread without it, has opened a context. */
int hold(int held, int release)
{
    char byte = 0;
    return write(held, &byte, 1) + read(release, &byte, 1);
}
int open_and_release(int (*set_device)(int), int device, int held, int release)
{
    char byte;
    int got = read(held, &byte, 1), error = set_device(device);
    return got + write(release, &byte, 1) + error;
}
"""


@pytest.fixture(scope="module")
def native(compile_c: Callable[..., Path]) -> Path:
    return compile_c(NATIVE, "libwatch.so")


def test_each_context_is_reported_once_with_the_line_that_opened_it(trace: Trace) -> None:
    run = trace("""
import pickle, torch

def make():
    return torch.empty(3, device="cuda:1")  # first

def receive(payload):
    return pickle.loads(payload)  # second

tensor = make()
payload = pickle.dumps(tensor).replace(b"cuda:1", b"cuda:0")
make(), receive(payload), receive(payload), torch.cuda.synchronize(0)
""")
    pid = run.done.pid
    assert [(r["pid"], r["device"]) for r in run.records] == [(pid, 1), (pid, 0)] == run.opened
    first, second = run.records
    assert run.lines(first) == ['return torch.empty(3, device="cuda:1")  # first', "tensor = make()"]
    assert [frame["function"] for frame in first["stack"]][-2:] == ["make", "<module>"]
    assert run.lines(second)[0] == "return pickle.loads(payload)  # second"
    assert any(frame["file"].endswith("torch/storage.py") for frame in second["stack"])
    for record in run.records:
        assert record["call"].startswith("cuda")
        assert Path(record["library"]).name == "libc10_cuda.so"
        assert record["function"].startswith("c10::cuda::")
        assert "libtorch_python.so" in record["libraries"]
        assert record["uuid"].endswith(f"-{record['device']:012x}")
        assert (record["kind"], record["no_stack"], record["omitted"]) == ("primary", None, 0)
        assert (record["tid"], record["python_thread"]) == (pid, "MainThread")
        assert run.script in record["command"]


def test_a_device_is_named_as_the_program_sees_it_and_by_uuid(trace: Trace) -> None:
    run = trace("import torch; torch.empty(1, device='cuda:0')", gpus=3, CUDA_VISIBLE_DEVICES="2")
    (record,) = run.records
    assert record["device"] == 0
    assert record["uuid"].endswith("-000000000002")
    assert run.opened == [(run.done.pid, 2)]


def test_a_python_thread_is_named(trace: Trace) -> None:
    run = trace("""
import threading, torch
def load():
    torch.empty(1, device="cuda:1")
thread = threading.Thread(target=load, name="loader")
thread.start()
thread.join()
""")
    (record,) = run.records
    assert (record["device"], record["python_thread"]) == (1, "loader")
    assert record["tid"] != record["pid"] == run.done.pid
    assert run.lines(record) == ['torch.empty(1, device="cuda:1")']


def test_a_native_thread_is_named_with_its_library_and_has_no_python_stack(trace: Trace, native: Path) -> None:
    run = trace(
        RUNTIME + "assert ctypes.CDLL(sys.argv[1]).on_native_thread(set_device, 1) == 0, 'it opened no context'",
        native,
    )
    (record,) = run.records
    assert (record["device"], record["thread"], record["python_thread"]) == (1, "watchdog", None)
    assert (record["library"], record["call"]) == (str(native), "cudaSetDevice")
    assert (record["stack"], record["no_stack"]) == ([], "this is not a Python thread")
    assert record["tid"] != record["pid"]


def test_threads_that_race_to_one_device_make_one_record(trace: Trace) -> None:
    run = trace("""
import threading, torch
barrier = threading.Barrier(8)
def load():
    barrier.wait()
    torch.empty(1, device="cuda:1")
threads = [threading.Thread(target=load) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
""")
    (record,) = run.records
    assert run.lines(record) == ['torch.empty(1, device="cuda:1")']


@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
def test_the_context_of_a_child_is_reported_with_its_pid_and_its_line(trace: Trace, method: str) -> None:
    source = """
import multiprocessing, os, sys, torch
def work(device):
    torch.empty(1, device=device)
if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    child = context.Process(target=work, args=("cuda:1",))
    child.start()
    child.join()
    assert child.exitcode == 0
    torch.empty(1, device="cuda:0")
    print(child.pid)
"""
    run = trace(source, method)
    child = int(run.done.stdout)
    assert [(r["pid"], r["device"]) for r in run.records] == [(child, 1), (run.done.pid, 0)] == run.opened
    assert run.lines(run.records[0])[0] == "torch.empty(1, device=device)"
    assert run.lines(run.records[1]) == ['torch.empty(1, device="cuda:0")']


def test_a_call_of_the_driver_makes_one_record(trace: Trace) -> None:
    run = trace("""
import ctypes, torch
driver, context = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p()
assert driver.cuInit(0) == 0
assert driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 1) == 0  # here
""")
    (record,) = run.records
    assert (record["device"], record["call"]) == (1, "cuDevicePrimaryCtxRetain")
    assert run.lines(record) == ["assert driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 1) == 0  # here"]


def test_a_thread_that_holds_the_gil_is_read_and_its_exception_is_kept(trace: Trace) -> None:
    run = trace(
        RUNTIME
        + """
prototype = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_int)(set_device.value)
try:
    raise KeyError("kept")
except KeyError as error:
    assert prototype(1) == 0  # with the GIL
    assert sys.exc_info()[1] is error
"""
    )
    (record,) = run.records
    assert run.lines(record) == ["assert prototype(1) == 0  # with the GIL"]


def test_a_thread_that_waits_for_the_opener_with_the_gil_causes_no_deadlock(trace: Trace, native: Path) -> None:
    run = trace(
        RUNTIME
        + """
import os, threading
(heard, held), (freed, release) = os.pipe(), os.pipe()
with_gil, without = ctypes.PyDLL(sys.argv[1]), ctypes.CDLL(sys.argv[1])
opener = threading.Thread(target=lambda: print(without.open_and_release(set_device, 1, heard, release)))
opener.start()
assert with_gil.hold(held, freed) == 2
opener.join()
torch.empty(1, device="cuda:0")  # not disturbed
""",
        native,
        DEVGUARD_TRACE_WAIT_MS="100",
    )
    assert run.done.stdout == "2\n"
    lost, second = run.records
    assert (lost["device"], lost["stack"], lost["no_stack"]) == (1, [], "another thread holds the GIL")
    assert Path(lost["library"]) == native
    assert run.lines(second) == ['torch.empty(1, device="cuda:0")  # not disturbed']


def test_a_deep_stack_and_a_strange_file_name_give_a_whole_record(trace: Trace) -> None:
    run = trace("""
import torch
def down(n):
    down(n - 1) if n else torch.empty(1, device="cuda:1")
source = "def strange():\\n    torch.empty(1, device='cuda:0')"
exec(compile(source, 'a "strange"\\n\\\\name\\udc80\\x01\\u00e9.py', "exec"))
down(500)
strange()
""")
    deep, strange = run.records
    assert len(deep["stack"]) == 200
    assert deep["omitted"] == 302
    assert strange["stack"][0]["file"] == 'a "strange"\n\\name\\udc80\x01\u00e9.py'
    assert strange["stack"][0]["line"] == 2


def test_a_program_that_opens_no_context_makes_no_record(trace: Trace) -> None:
    run = trace("""
import torch
assert torch.cuda.is_available() and torch.cuda.device_count() == 2
torch._C._cuda_hasPrimaryContext(0)
torch.cuda.get_device_properties(1)
""")
    assert run.records == [] == run.opened


def test_the_programs_output_and_status_are_unchanged(trace: Trace) -> None:
    source = "import sys, torch; torch.empty(1, device='cuda:0'); print('out', sys.argv[1:]); "
    source += "print('err', file=sys.stderr); sys.exit(7)"
    run = trace(source, "--output", "x", "--", "-y", check=False)
    assert run.done.returncode == 7
    assert run.done.stdout == "out ['--output', 'x', '--', '-y']\n"
    assert run.done.stderr == "err\n"
    assert len(run.records) == 1


def test_the_default_is_readable_text_on_standard_error(
    sim_environment: Callable[..., dict[str, str]], run_simulated: Callable[..., Finished], tmp_path: Path
) -> None:
    script = tmp_path / "program.py"
    script.write_text("import torch\n\ndef make():\n    torch.empty(1, device='cuda:1')\n\nmake()\n")
    words = ["-m", "devguard", "run", "--trace-contexts", "--", sys.executable, "-W", "error", str(script)]
    done = run_simulated(words, env=sim_environment(2))
    head, thread, call, libraries, title, *stack = done.stderr.splitlines()
    uuid = "GPU-64657667-7561-7264-0000-000000000001"
    assert head.startswith(f"devguard: context on device 1 ({uuid}), opened by pid {done.pid} ({sys.executable}")
    assert thread.startswith(f"  thread {done.pid} '")
    assert thread.endswith("', Python thread 'MainThread'")
    assert call.startswith("  call cuda")
    assert "libc10_cuda.so: c10::cuda::" in call
    assert libraries.startswith("  libraries, innermost first: libc10_cuda.so, ")
    assert title == "  Python stack, innermost first:"
    assert stack == [f"    {script}:4 make", f"    {script}:6 <module>"]
    assert done.stdout == ""


def test_sim_and_run_compose_in_both_orders(tmp_path: Path) -> None:
    devguard = [sys.executable, "-m", "devguard"]
    sim, run = [*devguard, "sim", "--"], [*devguard, "run", "--trace-contexts", "--"]
    program = [sys.executable, "-c", "import torch; torch.empty(1, device='cuda:1')"]
    for command in ([*sim, *run, *program], [*run, *sim, *program]):
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("devguard: context on device 1 ") == 1
        assert "<string>:1 <module>" in done.stderr


@pytest.mark.parametrize("closes", ["the shell", "the program"])
def test_nothing_is_written_into_a_file_of_the_program_under_the_number_of_standard_error(
    closes: str, tmp_path: Path, sim_environment: Callable[..., dict[str, str]]
) -> None:
    program = f"""
import os
if {closes!r} == "the program": os.closerange(2, 64)
own = os.open("own", os.O_RDWR | os.O_CREAT)
assert own == 2
import torch; torch.ones(1, device="cuda:1")
others = [os.open(f"other{{i}}", os.O_RDWR | os.O_CREAT) for i in range(12)]
os.closerange(3, 64)
others = [os.open(f"other{{i}}", os.O_RDWR | os.O_CREAT) for i in range(60)]
torch.ones(1, device="cuda:0")
print(torch.cuda.is_available(), sum(os.stat(name).st_size for name in os.listdir() if name[0] == "o"), flush=True)
os._exit(0)
"""
    command = [sys.executable, "-m", "devguard", "run", "--trace-contexts", "--", sys.executable, "-c", program]
    closed = ["sh", "-c", 'exec "$@" 2>&-', "sh"] if closes == "the shell" else []
    done = subprocess.run(
        [*closed, *command], cwd=tmp_path, env=sim_environment(2), stdout=subprocess.PIPE, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "True 0\n")
