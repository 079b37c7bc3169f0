"""An arena whose process has a full descriptor table, when readers come."""

from __future__ import annotations

import pytest

from tests.helpers.transport_children import run


@pytest.mark.parametrize("free", [0, 1])
def test_a_reader_waits_or_is_told_and_the_arena_does_not_spin(free: int) -> None:
    printed = run(f"""
import warnings
from devguard.transport import server
server.PAUSE = 0.05
attempts, accept = [], server.Server._accept
def counted(*arguments):
    attempts.append(time.monotonic())
    accept(*arguments)
server.Server._accept = counted
ready, go = os.pipe()
child_reads, child_writes = os.pipe()
child = os.fork()
if child == 0:
    signal.alarm(50)
    handle = pickle.loads(os.read(ready, 10_000))
    try:
        answer = str(len(handle.get()))
    except transport.PeerGone as error:
        answer = str(error)
    os.write(child_writes, answer.encode())
    os._exit(0)
arena = transport.Arena(budget=1 << 20)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    with few_descriptors({free}):
        os.write(go, pickle.dumps(arena.put(bytes(10))))
        if {free}:
            print(os.read(child_reads, 1000).decode())
        else:
            await_that(lambda: len(attempts) >= 3)
            assert attempts[-1] - attempts[0] > 0.05, attempts  # it pauses between attempts
    if not {free}:
        print(os.read(child_reads, 1000).decode())
        print(len(caught) >= 1 and "ulimit -n" in str(caught[0].message))
""")
    if free:
        assert "refuses: its process (" in printed
        assert "no room for another file descriptor" in printed
    else:
        assert printed.split() == ["10", "True"]
