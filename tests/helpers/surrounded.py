"""What must hold of devguard in all surroundings: `CHECKS`. They use no ``assert``, which ``python -O`` removes."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import io
import json
import multiprocessing.pool
import pickle
import sys
import threading
import traceback
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

import devguard
from devguard import guard, unguarded
from devguard.reporting.journal import journal

if TYPE_CHECKING:
    from tests.helpers.surroundings import Surroundings

Functions = dict[tuple[str, str], Any]
NOWHERE = (0, "None", 0)


class Wrong(Exception):
    """A check failed."""


@dataclasses.dataclass
class Program:
    """What the checks need; the message and the files hold four numbers that were saved on ``cuda:0``."""

    surroundings: Surroundings
    before: Functions
    message: bytes
    files: list[str]


Check = Callable[[Program], None]
CHECKS: dict[str, Check] = {}


def check(function: Check) -> Check:
    CHECKS[function.__name__] = function
    return function


def expect(actual: Any, expected: Any) -> None:
    if actual != expected:
        raise Wrong(f"{actual!r}, and not {expected!r}")


def expect_in(words: str, text: str) -> None:
    if words not in text:
        raise Wrong(f"no {words!r} in {text!r}")


def seen() -> tuple[int, str, int]:
    """Return the current device, the owner, and the device of a new tensor."""
    return torch.cuda.current_device(), str(devguard.owner()), torch.empty(1, device="cuda").device.index


def on(index: int) -> tuple[int, str, int]:
    """Return what `seen` returns in the scope of a device."""
    return index, f"cuda:{index}", index


def line() -> int:
    """Return the line that calls."""
    return sys._getframe(1).f_lineno


def in_new_thread(function: Callable[[], Any], kind: Callable[..., Any] = threading.Thread) -> Any:
    got: list[Any] = []
    arguments: Any = {"function": lambda: got.append(function()), "interval": 0} if kind is not threading.Thread else {}
    thread = kind(**arguments) if arguments else kind(target=lambda: got.append(function()))
    thread.start()
    thread.join()
    return got[0]


class OwnRun(threading.Thread):
    """A thread that overrides `run`."""

    def __init__(self, function: Callable[[], Any], interval: float) -> None:
        super().__init__()
        self.function = function

    def run(self) -> None:
        self.function()


def functions() -> Functions:
    """Return all callables of all modules but devguard's, and of the classes that they hold."""
    found: Functions = {}
    classes: dict[int, type] = {}
    for name, module in list(sys.modules.items()):
        if type(module) is ModuleType and name.partition(".")[0] not in ("devguard", "tests", "__main__"):
            held = list(vars(module).items())
            found.update({(name, each): value for each, value in held if is_callable(value)})
            classes.update({id(value): value for _, value in held if issubclass(type(value), type)})
    for kind in classes.values():
        name = f"{kind.__module__}.{kind.__qualname__}"
        if not name.startswith(("devguard.", "tests.")):
            found.update({(name, each): value for each, value in list(vars(kind).items()) if is_callable(value)})
    return found


def is_callable(value: Any) -> bool:
    # Not `isinstance`, which asks deprecated objects of torch for their class, at which they warn.
    return callable(value) or issubclass(type(value), (classmethod, staticmethod))


def changed(before: Functions) -> set[str]:
    after = functions()
    return {".".join(key) for key, value in before.items() if after.get(key) is not value}


@check
def the_surroundings_are_in_place(program: Program) -> None:
    expect(program.surroundings.is_in_place(), True)


# Scopes.


@check
def a_block_has_its_device_and_gives_it_back(program: Program) -> None:
    with guard(1):
        expect(seen(), on(1))
        with guard("cuda:2"):
            expect(seen(), on(2))
            with unguarded():
                expect(devguard.owner(), None)
            with contextlib.suppress(KeyError), guard(3):
                expect(seen(), on(3))
                raise KeyError
            expect(seen(), on(2))
            with guard("cpu"):
                expect(str(devguard.owner()), "cpu")
        with torch.cuda.device(3):
            expect(seen(), (3, "cuda:1", 3))
        expect(seen(), on(1))
    expect(seen(), NOWHERE)


@guard(2)
def decorated(outside: Callable[[], Any] | None = None) -> Any:
    return seen()


@guard(2)
async def coroutine() -> list[Any]:
    got = [seen()]
    for _ in range(3):
        await asyncio.sleep(0)
        got.append(seen())
    return got


@guard(2)
def generator() -> Iterator[Any]:
    yield seen()
    with torch.cuda.device(3):
        yield seen()
    yield seen()


@guard(2)
async def async_generator() -> AsyncIterator[Any]:
    yield seen()
    await asyncio.sleep(0)
    yield seen()


@check
def a_decorated_function_has_its_device_at_each_step(program: Program) -> None:
    expect(decorated(), on(2))
    expect(program.surroundings.run(coroutine()), [on(2)] * 4)
    got = []
    for step in generator():
        got.append(step)
        expect(seen(), NOWHERE)
    expect(got, [on(2), (3, "cuda:2", 3), on(2)])

    async def main() -> list[Any]:
        return [(step, seen()) async for step in async_generator()]

    expect(program.surroundings.run(main()), [(on(2), NOWHERE)] * 2)
    expect(seen(), NOWHERE)


@check
def tasks_do_not_see_each_others_device(program: Program) -> None:
    async def steps() -> set[Any]:
        got = set()
        for _ in range(5):
            got.add(seen())
            await asyncio.sleep(0)
        return got

    async def main() -> Any:
        together = program.surroundings.together
        scoped = [guard(index).run(steps()) for index in (1, 2, 3)]
        return await together(*scoped, steps()), await guard(1).run(together(coroutine(), steps())), seen()

    apart, within, after = program.surroundings.run(main())
    expect(apart, [{on(1)}, {on(2)}, {on(3)}, {NOWHERE}])
    expect(within, [[on(2)] * 4, {NOWHERE}])  # a task is not inside the scopes of the code that creates it
    expect(after, NOWHERE)


@check
def a_thread_has_the_scope_of_the_code_that_starts_it(program: Program) -> None:
    for kind in (threading.Thread, OwnRun, threading.Timer):
        expect(in_new_thread(seen, kind), NOWHERE)
        with guard(1):
            expect(in_new_thread(seen, kind), on(1))
            with guard(2):
                expect(in_new_thread(lambda: in_new_thread(seen, kind), kind), on(2))  # noqa: B023
            with unguarded():
                expect(in_new_thread(devguard.owner, kind), None)
        expect(in_new_thread(decorated, kind), on(2))
    expect(seen(), NOWHERE)


@check
def a_task_of_a_pool_has_the_scope_of_its_submitter(program: Program) -> None:
    with concurrent.futures.ThreadPoolExecutor(1) as executor, multiprocessing.pool.ThreadPool(1) as pool:
        ways: list[Callable[[], Any]] = [
            lambda: executor.submit(seen).result(),
            lambda: next(iter(executor.map(lambda _: seen(), [0]))),
            lambda: pool.apply(seen),
            lambda: pool.map(lambda _: seen(), [0])[0],
        ]
        for way in ways:
            for index in (1, 2):
                with guard(index):
                    expect(way(), on(index))
                expect(way(), NOWHERE)


@check
def a_worker_has_the_scope_of_the_coroutine(program: Program) -> None:
    async def main() -> Any:
        work = program.surroundings.in_thread
        loop = asyncio.get_running_loop()

        async def both() -> Any:
            return await work(seen), await loop.run_in_executor(None, seen)

        return [await both(), await guard(1).run(both()), await guard(2).run(both()), await both()]

    expect(program.surroundings.run(main()), [(NOWHERE,) * 2, (on(1),) * 2, (on(2),) * 2, (NOWHERE,) * 2])


# Arrivals.


def loads(program: Program) -> list[str]:
    """Load what was saved on cuda:0 in each way; return the devices."""
    message = program.message
    ways = [
        pickle.loads(message),
        pickle.load(io.BytesIO(message)),
        pickle.Unpickler(io.BytesIO(message)).load(),
        pickle._loads(message),  # type: ignore[attr-defined]
    ]
    for file in program.files:
        ways += [torch.load(file), torch.load(file, weights_only=False)]
    for tensor in ways:
        expect(tensor.tolist(), [0.0, 1.0, 2.0, 3.0])
    return sorted({str(tensor.device) for tensor in ways})


@check
def what_was_saved_elsewhere_lands_on_the_owner(program: Program) -> None:
    for index in (1, 2):
        with guard(index):
            expect(loads(program), [f"cuda:{index}"])
            expect(in_new_thread(lambda: loads(program)), [f"cuda:{index}"])
            with unguarded():
                expect(loads(program), ["cuda:0"])
            expect(str(torch.load(program.files[0], map_location="cuda:3").device), "cuda:3")
    with guard("cpu"):
        expect(loads(program), ["cpu"])
    expect(loads(program), ["cuda:0"])


@check
def what_a_worker_loads_lands_on_the_submitters_owner(program: Program) -> None:
    async def main() -> Any:
        work = program.surroundings.in_thread
        return [await guard(index).run(work(loads, program)) for index in (1, 2)], await work(loads, program)

    expect(program.surroundings.run(main()), ([["cuda:1"], ["cuda:2"]], ["cuda:0"]))
    with concurrent.futures.ThreadPoolExecutor(1) as executor, guard(1):
        expect(executor.submit(loads, program).result(), ["cuda:1"])


@check
def host_buffers_land_on_the_owner_in_remap(program: Program) -> None:
    with devguard.remap(2):
        expect(str(torch.frombuffer(bytearray(8), dtype=torch.uint8).device), "cuda:2")
        expect(loads(program), ["cuda:2"])
        expect(seen(), on(2))
    with guard(2):
        expect(str(torch.frombuffer(bytearray(8), dtype=torch.uint8).device), "cpu")


# What the user is told.


@check
def a_refusal_names_the_line(program: Program) -> None:
    ways: list[tuple[Callable[[], Any], int]] = [
        (lambda: pickle.loads(program.message), line()),
        (lambda: torch.load(program.files[0]), line()),
    ]
    for way, number in ways:
        with guard(1, mode="error"):
            try:
                way()
            except devguard.StrayDeviceError as error:
                expect_in(f"{__file__}:{number}", str(error))
            else:
                raise Wrong("no error")
            expect(seen(), on(1))


@check
def a_warning_names_the_line_and_ends_nothing(program: Program) -> None:
    stderr = io.StringIO()
    with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stderr(stderr), guard(1, mode="warn"):
        tensor, number = pickle.loads(program.message), line()
    expect(str(tensor.device), "cuda:0")
    text = stderr.getvalue() + "".join(f"{each.filename}:{each.lineno}: {each.message}" for each in caught)
    expect_in("cuda:0", text)
    expect_in(f"{__file__}:{number}", text)


@check
def the_record_of_a_stray_is_complete(program: Program) -> None:
    with guard(1):
        for _ in range(3):
            _, number = pickle.loads(program.message), line()
    (stray,) = [stray for stray in devguard.strays() if stray.door == "load"]
    expect((stray.source, stray.target, stray.owner, stray.action), ("cuda:0", "cuda:1", "cuda:1", "repaired"))
    expect((stray.count, stray.bytes), (3, 48))
    function = "the_record_of_a_stray_is_complete"
    expect(stray.site and (stray.site.file, stray.site.line, stray.site.function), (__file__, number, function))


@check
def the_record_of_handed_over_work_names_the_line_that_hands_it_over(program: Program) -> None:
    file = program.files[0]

    async def main() -> None:
        work = program.surroundings.in_thread
        lines.append((await work(torch.load, file)).ndim * line())
        lines.append((await work(torch.load, file)).ndim * line())

    lines: list[int] = []
    with concurrent.futures.ThreadPoolExecutor(1) as executor, guard(1):
        lines.append(executor.submit(torch.load, file).result().ndim * line())
        lines.append(executor.submit(torch.load, file).result().ndim * line())
    program.surroundings.run(guard(2).run(main()))
    found = [stray.site and (stray.site.file, stray.site.line) for stray in devguard.strays() if stray.door == "load"]
    expect(found, [(__file__, number) for number in lines])


@check
def no_strays_accepts_and_refuses(program: Program) -> None:
    with guard(1), devguard.no_strays():
        expect(seen(), on(1))
        expect(in_new_thread(seen), on(1))
    try:
        with guard(1), devguard.no_strays():
            _, number = pickle.loads(program.message), line()
    except devguard.StrayDeviceError as error:
        expect_in(f"{__file__}:{number}", str(error))
    else:
        raise Wrong("no error")
    expect(seen(), NOWHERE)


# The doors.


@check
def every_door_is_open_and_nothing_failed(program: Program) -> None:
    with guard(1):
        rows = devguard.status()["doors"]
        expect([name for name, row in rows.items() if not row["open"]], [])
        expect({name: row["failures"] for name, row in rows.items() if row.get("failures")}, {})
        expect(devguard.status()["problem"], None)


@check
def install_holds_on_all_threads_until_uninstall(program: Program) -> None:
    program.surroundings.remove_outer()
    devguard.install(1)
    expect(seen(), on(1))
    expect(in_new_thread(seen), on(1))
    expect(loads(program), ["cuda:1"])
    with guard(2):
        expect(in_new_thread(seen), on(2))
    expect(devguard.uninstall(), [])
    torch.cuda.set_device(0)  # as after the program's own set_device(1)
    expect(seen(), NOWHERE)
    expect(in_new_thread(seen), NOWHERE)
    expect(loads(program), ["cuda:0"])


@check
def uninstall_restores_every_function(program: Program) -> None:
    with guard(1):
        program.surroundings.after_first_guard()
        expect(in_new_thread(seen), on(1))
        program.surroundings.remove_outer()
        expect(in_new_thread(seen), on(1))
        expect(loads(program), ["cuda:1"])
    expect(devguard.uninstall(), [])
    expect(changed(program.before), set())
    expect(in_new_thread(seen), NOWHERE)


@check
def uninstall_leaves_the_wrappers_of_others_and_does_nothing_beneath_them(program: Program) -> None:
    with guard(1):
        program.surroundings.after_first_guard()
        expect(in_new_thread(seen), on(1))
    left = devguard.uninstall()
    expect([name for name in left if "Thread.start" in name], ["Thread.start"] * program.surroundings.is_outer)
    expect(in_new_thread(seen), NOWHERE)
    expect(loads(program), ["cuda:0"])
    with guard(2):
        expect(in_new_thread(seen), on(2))
        expect(loads(program), ["cuda:2"])
    expect(devguard.uninstall(), [])
    program.surroundings.remove_outer()
    with guard(1):
        expect(in_new_thread(seen), on(1))
        expect(loads(program), ["cuda:1"])
    expect(devguard.uninstall(), [])
    expect(changed(program.before), set())


def main(surroundings: Surroundings, folder: str, results: str) -> None:
    """Run all checks; write a dictionary with the traceback of each that failed, None for the others."""
    surroundings.before_first_guard()
    asyncio.run(asyncio.sleep(0))  # imports
    message = Path(folder, "message").read_bytes()
    program = Program(surroundings, functions(), message, [str(Path(folder, name)) for name in ("zip", "legacy")])
    with guard(1):
        pass
    surroundings.after_first_guard()
    found: dict[str, str | None] = {}
    for name, function in CHECKS.items():
        journal.clear()
        try:
            function(program)
            found[name] = None
        except BaseException:  # noqa: BLE001 - the test shows it
            found[name] = traceback.format_exc()
    Path(results).write_text(json.dumps(found))
    with guard(1):  # what still runs, or waits for work, must not keep the program from its end
        threading.Thread(target=threading.Event().wait, daemon=True).start()
        concurrent.futures.ThreadPoolExecutor(1).submit(seen)
