"""Tests of the interposed driver: a stand-in for libcuda.so.1 is called in each way that programs use.

The stand-in has the driver's functions and rules. Whether the real driver is called in these ways needs a GPU to show.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from devguard import tracing
from tests.helpers.simulated import POSSIBLE, ROOT

pytestmark = pytest.mark.skipif(not POSSIBLE, reason="contexts are traced on Linux only")

DRIVER = r"""
#include <sched.h>
#include <string.h>
typedef int CUresult;
enum { DEVICES = 2 };
static int users[DEVICES], current = -1, awaited;
static char contexts[DEVICES];
CUresult cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active)
{
    *flags = 0;
    *active = users[device] > 0;
    return 0;
}
CUresult cuDevicePrimaryCtxRetain(void **context, int device)
{
    if (device >= DEVICES) return 101;
    if (awaited) {
        __atomic_sub_fetch(&awaited, 1, __ATOMIC_SEQ_CST);
        while (__atomic_load_n(&awaited, __ATOMIC_SEQ_CST)) sched_yield();
    }
    users[device]++;
    *context = &contexts[device];
    return 0;
}
void meet(int threads) { awaited = threads; } /* waits until that many calls are inside before one opens the context */
void open_inside(int device) { users[device]++; }
CUresult cuDevicePrimaryCtxRelease_v2(int device) { users[device]--; return 0; }
CUresult cuDevicePrimaryCtxReset_v2(int device) { users[device] = 0; return 0; }
CUresult cuCtxCreate_v2(void **context, unsigned flags, int device) { current = device; return flags ? 1 : 0; }
CUresult cuCtxCreate_v4(void **context, void *parameters, unsigned flags, int device)
{
    current = device;
    return flags == 77 ? 0 : 1; /* all four arguments arrive */
}
CUresult cuCtxGetDevice(int *device) { *device = current; return 0; }
CUresult cuDeviceGetUuid(unsigned char *uuid, int device) { memset(uuid, 0, 16); uuid[15] = device; return 0; }
CUresult cuGetProcAddress_v2(const char *name, void **found, int version, unsigned long long flags, int *status)
{
    *found = !strcmp(name, "cuDevicePrimaryCtxRetain") ? (void *)cuDevicePrimaryCtxRetain
        : !strcmp(name, "cuCtxCreate") ? version >= 12050 ? (void *)cuCtxCreate_v4 : (void *)cuCtxCreate_v2
        : !strcmp(name, "cuGetProcAddress") ? (void *)cuGetProcAddress_v2
        : !strcmp(name, "cuCtxGetDevice") ? (void *)cuCtxGetDevice : 0;
    if (status) *status = *found ? 0 : 1;
    return *found ? 0 : 500;
}
"""

# Looks up a driver function in either way that a program can.
LOOKUP = r"""
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>
typedef int (*proc)(const char *, void **, int, unsigned long long, int *);
static void *find(const char *way, const char *name, int version)
{
    void *driver = dlopen("libcuda.so.1", RTLD_NOW), *found = 0;
    if (!strcmp(way, "dlsym")) return dlsym(driver, name);
    proc look_up = (proc)dlsym(driver, "cuGetProcAddress_v2");
    int status = -1;
    if (look_up("cuGetProcAddress", &found, version, 0, &status) || status) return 0; /* as libcudart does */
    look_up = (proc)found;
    char plain[64];
    snprintf(plain, sizeof plain, "%s", name);
    if (strstr(plain, "_v")) *strstr(plain, "_v") = 0; /* the version selects */
    return look_up(plain, &found, version, 0, &status) ? 0 : found;
}
"""

CLIENT = (
    LOOKUP
    + r"""
int open_primary(int (*retain)(void **, int), int device) { void *context; return retain(&context, device) + 0; }
int create(int (*make)(void **, unsigned, int), int device) { void *context; return make(&context, 0, device) + 0; }
int create_new(int (*make)(void **, void *, unsigned, int), int device)
{
    void *context;
    return make(&context, 0, 77, device) + 0;
}
int main(int count, char **words)
{
    void *retain = find(words[1], "cuDevicePrimaryCtxRetain", 12000);
    int errors = open_primary(retain, 1) + open_primary(retain, 1);
    if (open_primary(retain, 5) != 101) return 2;
    ((void (*)(int))dlsym(dlopen("libcuda.so.1", RTLD_NOW), "open_inside"))(0);
    errors += open_primary(retain, 0); /* this context is open already */
    errors += create(find(words[1], "cuCtxCreate_v2", 12000), 0);
    errors += create_new(find(words[1], "cuCtxCreate_v4", 13000), 1);
    int (*reset)(int) = dlsym(dlopen("libcuda.so.1", RTLD_NOW), "cuDevicePrimaryCtxReset_v2");
    errors += reset(1) + open_primary(retain, 1);
    if (!fork()) _exit(reset(1) + open_primary(retain, 1)); /* the child opens a context of its own */
    return errors;
}
"""
)

LINKED = r"""
int cuDevicePrimaryCtxRetain(void **, int), cuCtxCreate_v2(void **, unsigned, int), cuDevicePrimaryCtxRelease_v2(int);
int main(void)
{
    void *context;
    int errors = cuDevicePrimaryCtxRetain(&context, 1) + cuDevicePrimaryCtxRetain(&context, 1);
    errors += cuDevicePrimaryCtxRelease_v2(1) + cuDevicePrimaryCtxRetain(&context, 1);
    return errors + cuCtxCreate_v2(&context, 0, 0);
}
"""


@pytest.fixture(scope="module")
def driver(compile_c: Callable[..., Path]) -> Path:
    # -Bsymbolic keeps references within the stand-in from being interposed, as in the real driver.
    return compile_c(DRIVER, "libcuda.so.1", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1,-Bsymbolic")


@pytest.fixture
def traced(driver: Path, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """``traced(command)``: run a program over the stand-in, and return the records."""

    def run(*command: object, **variables: str) -> list[dict[str, Any]]:
        output = tmp_path / "records"
        base = os.environ | {"LD_LIBRARY_PATH": str(driver.parent), "PYTHONPATH": str(ROOT)} | variables
        env = tracing.environment(output, json=True, base=base)
        done = subprocess.run([str(word) for word in command], env=env, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        return [json.loads(line) for line in output.read_text().splitlines()]

    return run


@pytest.mark.parametrize("way", ["dlsym", "procaddress"])
def test_a_looked_up_function_is_traced(
    traced: Callable[..., list[dict[str, Any]]], compile_c: Callable[..., Path], way: str
) -> None:
    client = compile_c(CLIENT, "client", "-rdynamic", "-fno-optimize-sibling-calls")
    records = traced(client, way)
    child = records[-1]["pid"]
    seen = [(r["kind"], r["device"], r["call"], r["function"]) for r in records if r["pid"] != child]
    retained = ("primary", 1, "cuDevicePrimaryCtxRetain", "open_primary")
    created = ("created", 0, "cuCtxCreate", "create")
    assert seen == [retained, created, ("created", 1, "cuCtxCreate", "create_new"), retained]
    assert [(r["kind"], r["device"]) for r in records if r["pid"] == child] == [("primary", 1)]
    assert {Path(r["library"]).name for r in records} == {"client"}
    assert records[0]["uuid"] == "GPU-00000000-0000-0000-0000-000000000001"
    assert {r["no_stack"] for r in records} == {"this process has no Python"}


def test_a_program_that_links_the_driver_is_traced(
    traced: Callable[..., list[dict[str, Any]]], compile_c: Callable[..., Path], driver: Path
) -> None:
    records = traced(compile_c(LINKED, "linked", str(driver)))
    kinds = [(r["kind"], r["device"]) for r in records]
    assert kinds == [("primary", 1), ("created", 0)]  # one user was left, so the context stayed open


def test_a_python_program_that_calls_the_driver_is_traced_with_its_line(
    traced: Callable[..., list[dict[str, Any]]], tmp_path: Path
) -> None:
    script = tmp_path / "program.py"
    script.write_text(
        "import ctypes\n"
        "driver, context = ctypes.CDLL('libcuda.so.1'), ctypes.c_void_p()\n"
        "driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 1)\n"
    )
    (record,) = traced(sys.executable, "-W", "error", script)
    assert record["stack"] == [{"file": str(script), "line": 3, "function": "<module>"}]
    assert record["command"] == f"{sys.executable} -W error {script}"


@pytest.mark.parametrize(
    ("words", "kept"),
    [(["program.py", "--api-key=hunter2"], "program.py"), (["-um", "program", "hunter2"], "-um program")],
)
def test_a_record_holds_no_arguments_and_is_for_this_user_alone(
    traced: Callable[..., list[dict[str, Any]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    kept: str,
) -> None:
    (tmp_path / "program.py").write_text(
        "import ctypes\n"
        "driver, context = ctypes.CDLL('libcuda.so.1'), ctypes.c_void_p()\n"
        "driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 1)\n"
    )
    monkeypatch.chdir(tmp_path)
    before = os.umask(0)
    try:
        (record,) = traced(sys.executable, *words)
    finally:
        os.umask(before)
    assert record["command"] == f"{sys.executable} {kept}"
    assert oct((tmp_path / "records").stat().st_mode & 0o777) == "0o600"


def test_two_threads_that_open_one_context_together_make_one_record(
    traced: Callable[..., list[dict[str, Any]]], tmp_path: Path
) -> None:
    script = tmp_path / "program.py"
    script.write_text(
        "import ctypes, threading\n"
        "driver, context = ctypes.CDLL('libcuda.so.1'), ctypes.c_void_p()\n"
        "driver.meet(2)\n"
        "call = lambda: driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 1)\n"
        "threads = [threading.Thread(target=call, name='opener') for _ in range(2)]\n"
        "for thread in threads: thread.start()\n"
        "for thread in threads: thread.join()\n"
    )
    (record,) = traced(sys.executable, "-W", "error", script)
    assert (record["device"], record["python_thread"], record["stack"][0]["line"]) == (1, "opener", 4)


def test_other_lookups_use_the_real_dlsym(
    traced: Callable[..., list[dict[str, Any]]], compile_c: Callable[..., Path]
) -> None:
    """RTLD_NEXT must still start after the calling library."""
    shim = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <unistd.h>
pid_t getppid(void) { return ((pid_t (*)(void))dlsym(RTLD_NEXT, "getppid"))() + 1; }
"""
    program = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/syscall.h>
#include <unistd.h>
int main(void)
{
    void *driver = dlopen("libcuda.so.1", RTLD_NOW);
    if (getppid() != syscall(SYS_getppid) + 1) return 1;
    if (!dlsym(RTLD_DEFAULT, "getpid") || dlsym(RTLD_DEFAULT, "no_such_function")) return 2;
    dlerror();
    if (dlsym(driver, "cuCtxCreate_v3") || !dlerror()) return 3; /* the stand-in lacks it */
    return 0;
}
"""
    library = compile_c(shim, "libshim.so")
    assert traced(compile_c(program, "plain", "-fno-builtin"), LD_PRELOAD=str(library)) == []


def test_only_interposed_functions_are_exported() -> None:
    from devguard.tracing.library import library

    listed = subprocess.run(["nm", "-D", "--defined-only", library()], capture_output=True, text=True, check=True)
    names = {line.split()[-1] for line in listed.stdout.splitlines()}
    assert names - {"dlsym", "devguard_context_opened"} == {name for name in names if name.startswith("cu")}
    assert ctypes.CDLL(str(library())).cuDevicePrimaryCtxRetain(None, 0) == 3  # no driver: not initialized
