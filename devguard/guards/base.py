"""What `guard`, `remap` and `unguarded` share: a scope is an entry on the thread's stack, and a decorator."""

from __future__ import annotations

import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from types import TracebackType
from typing import Any, NoReturn, TypeVar

from devguard.doors import table
from devguard.errors import StrayDeviceError
from devguard.guards import decorate, returned, unwind
from devguard.guards.coroutines import Steps
from devguard.guards.parameter import Parameter
from devguard.modes import DoorMode
from devguard.ownership.stack import local
from devguard.support import callsite
from devguard.support.notices import warn_user

__all__ = ["Bound", "Scope"]

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")


INSPECT_EVERY_S = 0.1  # decorated functions are called in hot loops


class _Inspection:
    """The time of the last look for contexts after a call."""

    def __init__(self) -> None:
        self._last = 0.0

    def claim_turn(self) -> bool:
        """Return whether the last look was long enough ago; then this one counts as the last."""
        now = time.monotonic()
        if now - self._last < INSPECT_EVERY_S:
            return False
        self._last = now
        return True


_inspection = _Inspection()


class Scope:
    """Base class of `guard`, `remap` and `unguarded`: an entry on the thread's stack, and a decorator."""

    __slots__ = ()

    def mode_of(self, door: str) -> DoorMode | None:
        """Return the mode that this scope sets for `door`, None where it leaves that to the scope around it."""
        return None

    def requests(self, door: str) -> bool:
        """Return whether this scope requests a door that acts on request only."""
        return False

    def names(self, door: str) -> bool:
        """Return whether this scope sets the mode of `door` by its name."""
        return False

    @property
    def parameter(self) -> str | None:
        """The parameter of a decorated function that holds the device; None if none does."""
        return None

    @property
    def is_resolved(self) -> bool:
        """Whether the owner is known before a call."""
        return True

    def resolved(self, parameter: Parameter | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Scope:
        """Return this scope with its owner known, for one call of a decorated function."""
        return self

    def after_call(self, function: Callable[..., Any], result: Any) -> Any:
        """Return the result of a call of a plain decorated function; if it is code that runs later, inside this scope.

        After the outermost call, also look for contexts that no door explains.
        """
        self.look_after(function)
        try:
            if type(result) in returned.PLAIN or not returned.is_later(result):
                return result
            return returned.within(self, result, function)
        except Exception as error:  # noqa: BLE001 - the call has worked, and its result must not be lost
            if returned.is_later(result):
                name = callsite.name_of(function)
                warn_user(f"What {name} returned runs outside {self!r}: {type(error).__name__}: {error}")
            return result

    def look_after(self, function: Callable[..., Any]) -> None:
        """Look for contexts that no door explains, if the call of a decorated function that ends was the outermost."""
        if not local.stack and _inspection.claim_turn():
            name = callsite.name_of(function)
            try:
                table.inspect(f"after {name} had returned")
            except StrayDeviceError:
                raise
            except Exception as error:  # noqa: BLE001 - the call has worked, and its result must not be lost
                warn_user(f"devguard could not look for contexts after {name}: {type(error).__name__}: {error}")

    def steps(self, inner: Any) -> Steps:
        """Return an awaitable iterator that runs each step of `inner` inside this scope."""
        return Steps(self, inner)

    def __enter__(self) -> Any:
        raise NotImplementedError

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        stack = local.stack
        if stack and (entry := stack[-1])[0] is self:
            # First the undo, by two instructions between which Python handles no signal.
            del stack[-1]
            inside = stack.give_back(entry[2])
            if stack.changes:
                unwind.judge_changes(stack, entry, inside, kind is not None)
        else:
            unwind.leave(self, sys._getframe(1), kind is not None)

    async def __aenter__(self) -> NoReturn:
        name = type(self).__name__
        raise TypeError(
            f"`async with {name}(...)` is not supported: Python has no hook on a task switch, so other tasks would run "
            f"on this device. Use `await {name}(...).run(awaitable)`, or decorate the coroutine function with "
            f"@{name}(...): both hold the device only while your code runs."
        )

    async def __aexit__(self, *error: object) -> None:
        """Do nothing: entering raises."""

    def __call__(self, function: F) -> F:
        """Decorate `function`: each call of it runs inside this scope.

        Parameters
        ----------
        function : callable
            A function, method, ``staticmethod``, ``classmethod``, ``partialmethod``, coroutine function, generator
            function or asynchronous generator function. Where it is plain and returns a coroutine, a generator or a
            context manager of ``contextlib``, that code runs inside this scope, too.

        Returns
        -------
        callable
            A native function of the same kind.

        Raises
        ------
        ConfigError
            If the function lacks the parameter that the scope takes its device from, or may change it on the way.
        """
        decorated: F = decorate.wrap(self, function, self.parameter)
        return decorated

    def bind(self, function: Callable[..., Any]) -> Bound:
        """Return a picklable callable that runs `function` inside this scope; for inline use.

        Examples
        --------
        >>> multiprocessing.Process(target=devguard.guard(1).bind(work))
        """
        return Bound(self, function)

    async def run(self, awaitable: Awaitable[T]) -> T:
        """Await `awaitable`; each of its steps runs inside this scope, which is left while `awaitable` is suspended.

        Parameters
        ----------
        awaitable : awaitable
            A coroutine, or another object with ``__await__``. Not a Task or Future, which the event loop steps
            outside this scope.

        Returns
        -------
        object
            What `awaitable` returns.
        """
        if getattr(awaitable, "_asyncio_future_blocking", None) is not None:
            raise TypeError(
                f"run() got {awaitable!r}, which the event loop steps outside this scope. Pass the "
                f"coroutine: asyncio.create_task({type(self).__name__}(...).run(coroutine))."
            )
        scope = self.resolved(None, (), {})
        inner = awaitable if hasattr(awaitable, "send") else awaitable.__await__()
        result: T = await scope.steps(inner)
        return result


class Bound:
    """A function and the scope it runs in, as one picklable callable; made by ``guard(...).bind(function)``."""

    __slots__ = ("_decorated", "function", "scope")

    def __init__(self, scope: Scope, function: Callable[..., Any]) -> None:
        self.scope = scope
        self.function = function
        self._decorated = scope(function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._decorated(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return Bound, (self.scope, self.function)

    def __repr__(self) -> str:
        return f"{self.scope!r}.bind({getattr(self.function, '__qualname__', self.function)})"
