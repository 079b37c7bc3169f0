"""Arenas that cannot be made, that are forked or closed, and leases whose readers die before they are filled."""

from __future__ import annotations

import asyncio
import concurrent.futures
import pickle
import subprocess
import sys
from typing import Any

import pytest

from devguard.errors import DevGuardError, HandleReleased
from devguard.reporting import sampler
from devguard.transport import Arena, join
from tests.helpers.simulated import ROOT
from tests.helpers.transport_children import await_that, run

MIB = 1 << 20


def test_a_reader_that_dies_between_grant_and_copy_harms_no_other_lease(
    arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = join(arena.address, "tp0")
    wait, others = arena._await, []

    def awaited(*arguments: Any) -> Any:
        lease = wait(*arguments)
        monkeypatch.setattr(arena, "_await", wait)
        reader.close()
        await_that(lambda: not arena.usage().leases)
        others.append(arena.put(bytes(MIB)))  # it has the place in the index that the first lease had
        return lease

    monkeypatch.setattr(arena, "_await", awaited)
    handle = arena.put(b"1" * MIB, to=["tp0"])
    with join(arena.address, "tp0"):
        with pytest.raises(HandleReleased):
            handle.get()
        assert others[0].get() == bytes(MIB)


def test_an_arena_and_its_puts_refuse_by_name_in_a_forked_child() -> None:
    assert (
        run("""
import asyncio
arena = transport.Arena(budget=1 << 20)
handle = arena.put(bytes(1 << 18))
child = os.fork()
if child == 0:
    refused = []
    for use in (lambda: arena.put(b""), lambda: asyncio.run(arena.put_async(b"")), handle.cancel):
        try:
            use()
        except transport.arena.DevGuardError as error:
            refused.append(str(error))
    arena.close()
    del handle
    assert f"belongs to process {os.getppid()}, which forked this one ({os.getpid()})" in refused[0], refused
    assert refused[1] == refused[0], refused
    assert "Only the process that has put lease 1" in refused[2], refused
    os._exit(0)
status = os.waitpid(child, 0)[1]
assert handle.get() == bytes(1 << 18)
print(status)
""")
        == "0"
    )


def test_an_arena_cannot_be_pickled(arena: Arena) -> None:
    with pytest.raises(TypeError, match="send the handles"):
        pickle.dumps(arena)


def test_a_full_descriptor_table_is_named_and_nothing_stays_open() -> None:
    assert (
        run("""
failures = 0
while True:
    before = descriptors(), maps()
    with few_descriptors(failures):
        try:
            arena = transport.Arena(budget=1 << 20)
            break
        except transport.arena.DevGuardError as error:
            assert "ulimit -n" in str(error), error
            error = None
    assert (descriptors(), maps()) == before
    failures += 1
print(failures)
""")
        == "4"
    )  # the index, the thread's two, and the socket


def test_a_put_without_a_descriptor_for_its_memory_is_refused_and_the_next_one_is_not() -> None:
    assert run("""
arena = transport.Arena(budget=1 << 20)
with few_descriptors(0):
    try:
        arena.put(bytes(1 << 18))
    except transport.arena.DevGuardError as error:
        assert "ulimit -n" in str(error), error
    small = arena.put(b"in the handle")
    usage = arena.usage()
    assert (usage.in_use, usage.allocated, usage.waiting) == (0, 0, 0), usage
print(len(arena.put(bytes(1 << 19)).get()))
""") == str(1 << 19)


def test_close_gives_all_descriptors_and_maps_back_without_a_collection() -> None:
    assert (
        run("""
import asyncio
gc.disable()
async def put(arena):
    try:
        await arena.put_async(bytes(1 << 19))
    except transport.arena.DevGuardError as error:
        assert "closed" in str(error)
before = descriptors(), maps()
with transport.Arena(budget=1 << 20) as arena:
    arena.put(bytes(1 << 19), to=["tp0"])
    sent = pickle.dumps(arena.put(bytes(1 << 18)))
    fill = arena._fill
    def ended(*arguments):
        arena._end("is closed")
        return fill(*arguments)
    arena._fill = ended
    asyncio.run(put(arena))
now = descriptors(), maps()
assert now == before, (now, before)
print(arena.usage().in_use)
""")
        == "0"
    )


def test_a_fault_of_the_thread_ends_the_puts_that_wait() -> None:
    assert (
        run("""
arena = transport.Arena(budget=1 << 20)
held = arena.put(bytes(900_000), to=["tp0"])
refused = []
def put():
    try:
        arena.put(bytes(900_000))
    except transport.arena.DevGuardError as error:
        refused.append(str(error))
thread = threading.Thread(target=put)
thread.start()
await_that(lambda: arena.usage().waiting)
arena._server.post(lambda: 1 / 0)
thread.join(20)
try:
    arena.put(b"")
except transport.arena.DevGuardError as error:
    refused.append(str(error))
assert len(refused) == 2, refused
assert all("has ended by a fault" in text for text in refused), refused
""")
        == ""
    )


def test_a_closed_arena_lets_a_view_finish(arena: Arena) -> None:
    with arena.put(b"1" * MIB).view() as value:
        arena.close()
        assert bytes(value) == b"1" * MIB


def test_a_cancelled_await_gives_its_room_back(arena: Arena) -> None:
    held = arena.put(bytes(3 * MIB))

    async def main() -> None:
        waiting = asyncio.ensure_future(arena.put_async(bytes(2 * MIB)))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(main())
    held.cancel()
    assert len(arena.put(bytes(3 * MIB), timeout=30).get()) == 3 * MIB


def test_an_await_whose_arena_is_closed_before_the_copy_says_so(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    request = arena._request

    def closing(*arguments: Any, **options: Any) -> None:
        request(*arguments, **options)
        arena._end("is closed")
        arena._copier.shutdown()

    monkeypatch.setattr(arena, "_request", closing)
    with pytest.raises(DevGuardError, match="is closed"):
        asyncio.run(arena.put_async(bytes(MIB)))


def test_errors_of_an_arena_survive_pickling(arena: Arena) -> None:
    with pytest.raises(DevGuardError) as caught:
        arena.put(bytes(5 * MIB))
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_closing_ends_a_put_that_waits(arena: Arena) -> None:
    held = arena.put(bytes(3 * MIB), to=["tp0"])
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(arena.put, bytes(3 * MIB))
        await_that(lambda: arena.usage().waiting)
        arena.close()
        with pytest.raises(DevGuardError, match="closed"):
            waiting.result(timeout=30)
    del held


def test_the_log_samples_an_arena_until_it_is_closed() -> None:
    assert sampler.take_sample().get("arenas") is None
    with Arena(budget=1 << 20) as first, Arena(budget=1 << 21) as second:
        found = sampler.take_sample()["arenas"]
        assert [(each["address"], each["budget"]) for each in found] == [
            (first.address, 1 << 20),
            (second.address, 1 << 21),
        ]
        first.close()
        assert [each["address"] for each in sampler.take_sample()["arenas"]] == [second.address]
    assert sampler.take_sample().get("arenas") is None


def test_a_sample_waits_for_no_put() -> None:
    with Arena(budget=1 << 20) as arena:
        arena.put(bytes(1 << 19)).__reduce__()
        waiting = concurrent.futures.ThreadPoolExecutor(1)
        put = waiting.submit(arena.put, bytes(1 << 19))
        await_that(lambda: sampler.take_sample()["arenas"][0]["waiting"] == 1)
        assert not put.done()
        arena.close()
        assert isinstance(put.exception(20), DevGuardError)
        waiting.shutdown()


def test_a_forked_child_does_not_sample_the_arena_of_its_parent() -> None:
    assert (
        run("""
from devguard.reporting import sampler
arena = transport.Arena(budget=1 << 20)
child = os.fork()
if child == 0:
    assert "arenas" not in sampler.take_sample()
    with transport.Arena(budget=1 << 21) as own:
        assert [each["address"] for each in sampler.take_sample()["arenas"]] == [own.address]
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
print([each["budget"] for each in sampler.take_sample()["arenas"]])
arena.close()
""")
        == "[1048576]"
    )


def test_only_the_process_with_the_arena_loads_what_samples_it(arena: Arena) -> None:
    program = """
import pickle, sys
handle = pickle.loads(bytes.fromhex(sys.argv[1]))
passed_on = pickle.dumps(handle)
assert handle.get() == b"1" * 200_000
print([name for name in ("torch", "devguard.reporting") if name in sys.modules])
"""
    handle = pickle.dumps(arena.put(b"1" * 200_000)).hex()
    done = subprocess.run(
        [sys.executable, "-c", program, handle], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")
