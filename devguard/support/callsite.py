"""The call site of a stray: the first frame outside torch, devguard, the standard library and transports.

A stack is kept as pairs (code object, line), which costs a few microseconds. Formatting it costs ten times that, so a
stack is formatted when a record is read.
"""

from __future__ import annotations

import contextvars
import functools
import linecache
import os
import sys
import sysconfig
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any, NamedTuple

__all__ = [
    "find",
    "Frame",
    "has_user_code",
    "is_user",
    "module_of",
    "name_of",
    "Origin",
    "origin_of",
    "runs",
    "runs_user_code",
    "SeenLines",
    "Site",
    "stack_of",
    "user_frame",
    "when_freed",
]

STACK_DEPTH = 12
MAX_KINDS = 1 << 16

# Packages that carry objects from one process to another. The call site of a stray that comes through one of them is
# in its caller.
TRANSPORTS = frozenset({"cloudpickle", "dill", "joblib", "loky", "multiprocess", "safetensors", "torch_xla", "zmq"})
# Other packages that never hold the call site: event loops and pools run what other code hands to them.
OURS = frozenset({"devguard", "torch", "torchgen", "triton", "wrapt"})
POOLS = frozenset({"anyio", "asgiref", "eventlet", "gevent", "trio", "uvloop"})
# They wrap functions of other packages, so that their frames lie between the user's and the function that was called.
TRACERS = frozenset({"ddtrace", "elasticapm", "logfire", "newrelic", "opentelemetry", "sentry_sdk"})
_NEVER_USER = OURS | POOLS | TRACERS

_USER, _INTERNAL = 0, 1
# Keyed by the identity of the code object, because its own hash reads all of its bytecode (microseconds for a function
# of torch's size). The reference removes the entry when the object is freed, before another one can take its identity.
_kinds: dict[int, tuple[int | str, weakref.ref[CodeType]]] = {}
# The code objects among them that are neither a call site nor a transport: most frames of a stack.
INTERNAL: set[int] = set()

_STDLIB = tuple(
    os.path.normcase(os.path.realpath(path)) + os.sep
    for path in {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}
    if path
)
_SITE = tuple(f"{os.sep}{name}{os.sep}" for name in ("site-packages", "dist-packages"))
_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_DEMO = os.path.join(_PACKAGE, "demo", "")  # counts as a user's program, although it ships with the package

# Packages of the standard library that carry objects between processes; `via` names them.
_STDLIB_TRANSPORTS = ("multiprocessing", "concurrent")


class Frame(NamedTuple):
    """One line of a stack, unformatted."""

    code: CodeType
    line: int


@dataclass(frozen=True, slots=True)
class Site:
    """A line of source code.

    Attributes
    ----------
    file : str
        The path as Python knows it.
    line : int
        The line, from 1.
    function : str
        The function's qualified name, ``<module>`` at top level.
    """

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} in {self.function}"

    @property
    def source(self) -> str:
        """The text of the line, stripped; empty if the source is not available."""
        return linecache.getline(self.file, self.line).strip()

    @classmethod
    def of(cls, frame: Frame) -> Site:
        """Format a raw frame."""
        name = getattr(frame.code, "co_qualname", frame.code.co_name)  # co_qualname: Python 3.11
        return cls(frame.code.co_filename, frame.line, name)


def _kind_of(code: CodeType) -> int | str:
    known = _kinds.get(id(code))
    if known is None:
        if len(_kinds) >= MAX_KINDS:
            INTERNAL.clear()
            _kinds.clear()  # a program that creates code objects without end must not fill the memory
        known = _kinds[id(code)] = (_classify(code), when_freed(code, _forget))
        if known[0] == _INTERNAL:
            INTERNAL.add(id(code))
    return known[0]


def _forget(identity: int) -> None:
    INTERNAL.discard(identity)
    _kinds.pop(identity, None)


def when_freed(code: CodeType, forget: Callable[[int], object]) -> weakref.ref[CodeType]:
    """Return a reference that calls ``forget(id(code))`` when the code object is freed, as of a generated function."""
    identity = id(code)
    return weakref.ref(code, lambda _: forget(identity))


class SeenLines:
    """Lines of code objects, by identity because equal code may lie in two files; forgotten with the code objects."""

    def __init__(self) -> None:
        self._lines: dict[int, tuple[set[int], weakref.ref[CodeType]]] = {}

    def add(self, code: CodeType, line: int) -> bool:
        """Add a line; return whether it is new."""
        known = self._lines.get(id(code))
        if known is None:
            known = self._lines[id(code)] = set(), when_freed(code, lambda identity: self._lines.pop(identity, None))
        is_new = line not in known[0]
        known[0].add(line)
        return is_new

    def clear(self) -> None:
        """Forget all lines."""
        self._lines.clear()


def is_user(code: CodeType) -> bool:
    """Return whether `code` belongs to the user: not to torch, devguard, the standard library or a transport."""
    return _kind_of(code) == _USER


def runs_user_code(work: Any) -> bool:
    """Return whether a callable is user code: not torch's, not the standard library's, not decorated by devguard."""
    code = _code_of(work)
    return work is not None and (code is None or is_user(code))


def has_user_code(work: Any) -> bool:
    """Return whether a callable runs in a frame of user code, which a function of C or of a library does not."""
    code = _code_of(work)
    return code is not None and is_user(code)


def _code_of(work: Any) -> CodeType | None:
    """Return the code object of a callable, through partial objects; None for a function of C."""
    code: CodeType | None = getattr(work, "__code__", None)
    if code is not None:  # a function, or a method
        return code
    while isinstance(work, functools.partial):
        in_context = isinstance(getattr(work.func, "__self__", None), contextvars.Context)  # asyncio.to_thread
        work = work.args[0] if in_context and work.args else work.func
    work = getattr(work, "__func__", work)
    call = work if hasattr(work, "__code__") else vars(type(work)).get("__call__")
    return getattr(call, "__code__", None)


def find(start: FrameType) -> tuple[CodeType | None, int, str | None]:
    """Find the first frame of user code, from `start` outwards.

    Returns
    -------
    code : code object or None
        The user's code. None if the whole stack is internal, as when a spawned child unpickles its arguments.
    line : int
        The line, from 1; 0 if there is no user code.
    via : str or None
        The outermost transport between `start` and the user's frame.
    """
    via: str | None = None
    frame: FrameType | None = start
    internal = INTERNAL
    while frame is not None:
        code = frame.f_code
        if id(code) in internal:
            frame = frame.f_back
            continue
        kind = _kind_of(code)
        if kind == _USER:
            return code, frame.f_lineno, via
        if kind.__class__ is str:
            via = kind
        frame = frame.f_back
    return None, 0, via


class Origin(NamedTuple):
    """The call site and the stack of an event, kept for later without a frame: the results of `find` and `stack_of`."""

    code: CodeType | None
    line: int
    via: str | None
    stack: tuple[Frame, ...]


def origin_of(start: FrameType) -> Origin:
    """Return the origin of an event that happens in the frame `start`."""
    return Origin(*find(start), stack_of(start))


def user_frame(start: FrameType) -> FrameType | None:
    """Return the first frame of user code, from `start` outwards; None if there is none."""
    frame: FrameType | None = start
    while frame is not None and not is_user(frame.f_code):
        frame = frame.f_back
    return frame


def module_of(start: FrameType) -> str:
    """Return the module of the first frame of user code, from `start` outwards; empty if there is none."""
    frame = user_frame(start)
    return "" if frame is None else str(frame.f_globals.get("__name__", ""))


def runs(frame: FrameType | None, code: CodeType) -> bool:
    """Return whether `frame` or one of its callers runs `code`."""
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame is not None


def name_of(function: object) -> str:
    """Return the name of a callable for a message: its qualified name, else that of its class."""
    return str(getattr(function, "__qualname__", type(function).__name__))


def stack_of(start: FrameType) -> tuple[Frame, ...]:
    """Return the innermost frames, from `start` outwards, without devguard's own."""
    frames: list[Frame] = []
    frame: FrameType | None = start
    while frame is not None and len(frames) < STACK_DEPTH:
        file = frame.f_code.co_filename
        if file.startswith(_DEMO) or not file.startswith(_PACKAGE):
            frames.append(Frame(frame.f_code, frame.f_lineno))
        frame = frame.f_back
    return tuple(frames)


def _classify(code: CodeType) -> int | str:
    """Return `_USER`, `_INTERNAL`, or the name of the transport to which the code belongs."""
    file = code.co_filename
    if file.startswith("<frozen"):
        return _INTERNAL
    if file == "<string>" and code.co_name == "<module>" and "spawn_main" in code.co_names:
        return "multiprocessing"  # the `python -c` line of a spawned child
    path = os.path.normcase(os.path.abspath(file)) if not file.startswith("<") else file
    if path.startswith(_PACKAGE):
        return _USER if path.startswith(_DEMO) else _INTERNAL
    top = _top_package(path)
    if top is not None:
        if top in TRANSPORTS:
            return top
        return _INTERNAL if top in _NEVER_USER else _USER
    torch = sys.modules.get("torch")
    torch_file = getattr(torch, "__file__", None)
    if torch_file and path.startswith(os.path.dirname(os.path.abspath(torch_file)) + os.sep):
        return _INTERNAL  # torch from an overlay or a source tree
    for stdlib in _STDLIB:
        if path.startswith(stdlib):
            name = path[len(stdlib) :].split(os.sep, 1)[0]
            return name if name in _STDLIB_TRANSPORTS else _INTERNAL
    return _USER


def _top_package(path: str) -> str | None:
    """Return the top-level package of an installed file; None for a file outside every site-packages folder."""
    for marker in _SITE:
        _, found, rest = path.rpartition(marker)
        if found:
            name = rest.split(os.sep, 1)[0]
            return name[:-3] if name.endswith(".py") else name
    return None
