"""Readers that cannot read: of another user, in another namespace, without room for a descriptor, or too late."""

from __future__ import annotations

import os

import pytest

from devguard.errors import HandleReleased
from devguard.transport import Arena
from devguard.transport.reader import Reader
from devguard.transport.wire import Kind
from tests.helpers.transport_children import encode, hear, is_allowed, run, say, started

KIB = 1 << 10
LARGE = 256 * KIB

GET = """
try:
    print(len(handles[0].get()))
except transport.PeerGone as error:
    print("PeerGone:", error)
"""


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs a second user")


@needs_root
@pytest.mark.parametrize("size", [10, LARGE], ids=["inline", "segment"])
def test_a_reader_of_another_user_is_told_so(arena: Arena, size: int) -> None:
    printed = run("os.setuid(65534)" + GET, encode(arena.put(bytes(size))))
    assert printed.startswith("PeerGone: The arena at ")
    assert "belongs to user 0, this one to user 65534" in printed


@needs_root
def test_an_arena_refuses_a_reader_of_another_user_that_does_not_look(arena: Arena) -> None:
    code = "os.setuid(65534)\nfrom devguard.transport import wire\nwire.refuse_user = lambda channel: ''" + GET
    printed = run(code, encode(arena.put(bytes(LARGE))))
    assert "refuses: process" in printed
    assert "belongs to user 65534" in printed
    assert arena.usage().readers == ()


@pytest.mark.parametrize("options", [("-U",), ("-p", "-f"), ("-U", "-p", "-f")], ids=["user", "pid", "both"])
def test_another_user_or_pid_namespace_does_not_matter(arena: Arena, options: tuple[str, ...]) -> None:
    if not is_allowed("unshare", *options):
        pytest.skip("this machine allows no such namespace")
    assert run(GET, encode(arena.put(bytes(LARGE))), before=("unshare", *options)) == str(LARGE)


def test_an_arena_in_another_pid_namespace_can_be_read_and_its_end_is_seen() -> None:
    before = ("unshare", "-p", "-f", "--kill-child")
    if not is_allowed(*before):
        pytest.skip("this machine allows no such namespace")
    code = f"""
arena = transport.Arena(budget=1 << 20)
print(pickle.dumps([arena.put(bytes({LARGE})), arena.put(bytes({LARGE}))]).hex())
sys.stdin.readline()
"""
    with started(code, before=before) as sender:
        handles = hear(sender)
        with started(
            "first, second = handles[0]\nprint(len(first.get()))\nsys.stdin.readline()\n"
            "def over():\n"
            "    try: transport.join(first.address)\n"
            "    except transport.PeerGone as error: print(error); return True\n"
            "await_that(over)\n"
            "try: second.get()\n"
            "except transport.PeerGone: print('PeerGone')\n",
            handles,
        ) as reader:
            assert hear(reader) == str(LARGE)
            sender.kill()
            sender.wait()
            say(reader)
            assert "has ended" in hear(reader)
            assert hear(reader) == "PeerGone"


def test_another_network_namespace_is_named(arena: Arena) -> None:
    if not is_allowed("unshare", "-n"):
        pytest.skip("this machine allows no such namespace")
    printed = run(GET, encode(arena.put(bytes(LARGE))), before=("unshare", "-n"))
    assert printed.startswith("PeerGone: No arena listens at")
    assert "network namespace" in printed


def test_a_full_descriptor_table_of_a_reader_is_named_and_nothing_stays_open(arena: Arena) -> None:
    handle = arena.put(bytes(LARGE))
    printed = run(
        """
failures = 0
while True:
    before = descriptors(), maps()
    with few_descriptors(failures):
        try:
            size = len(handles[0].get())
            break
        except transport.PeerGone as error:
            assert "ulimit -n" in str(error), error
    hub = transport.reading._hub
    if hub._selector is not None:  # it stays, for the next attempt
        own = str(hub._wake), str(hub._selector.fileno())
        before[0].update(text for text in descriptors() if text.split()[0] in own)
    await_that(lambda: (descriptors(), maps()) == before)
    failures += 1
print(failures, size)
""",
        encode(handle),
    )
    assert printed == f"5 {LARGE}"  # the connection, its pidfd, the thread's two, and the index or the segment


def test_a_segment_that_finds_no_descriptor_ends_the_reader_by_name_and_it_can_come_again(arena: Arena) -> None:
    arena._ledger._segment = 1 << 20
    with started("""
reader = transport.join(handles[0].address)
print(len(handles[0].get()))
with few_descriptors(0):
    print("full")
    later = pickle.loads(bytes.fromhex(sys.stdin.readline()))
    try:
        later.get()
    except transport.PeerGone as error:
        print(error)
print(len(later.get()))
""", encode(arena.put(bytes(LARGE), to=2))) as reader:  # fmt: skip
        assert hear(reader) == str(LARGE)
        assert hear(reader) == "full"
        say(reader, encode(arena.put(bytes(1 << 20))))
        assert "ulimit -n" in hear(reader)
        assert hear(reader) == str(1 << 20)


@pytest.mark.parametrize("size", [10, LARGE], ids=["inline", "segment"])
def test_an_arena_whose_process_has_ended_is_named(size: int) -> None:
    sent = run(f"print(pickle.dumps(transport.Arena(budget=1 << 20).put(bytes({size}))).hex())")
    assert "PeerGone: No arena listens at" in run(GET, sent)


def test_a_view_that_was_overwritten_says_so(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = arena.put(b"1" * LARGE)
    send = Reader.send

    def late(self: Reader, kind: Kind, number: int, value: int = 0) -> None:
        if kind is not Kind.OPEN:  # it arrives after the words of the other readers
            send(self, kind, number, value)

    monkeypatch.setattr(Reader, "send", late)
    with pytest.raises(HandleReleased, match="while it was viewed"), handle.view():
        run(GET, encode(handle))
        assert arena.usage().leases == ()


def test_what_was_overwritten_is_named_and_not_how_it_fails_to_unpickle(
    arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overwritten(*_: object) -> None:
        arena._words[handle.slot] = 0
        raise ValueError("garbage")

    handle = arena.put(bytes(LARGE))
    monkeypatch.setattr("devguard.transport.unpack.unpack", overwritten)
    with pytest.raises(HandleReleased, match="while it was read"):
        handle.get()
