"""`guard`: the scope with an owner.

A guard object holds configuration only. It pickles, copies and compares by value, and threads may share one; the state
of one entry lies on the thread's stack (ownership/stack.py). Entering sets the current device of the thread. Modes and
doors decide about work that would land elsewhere.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from devguard import modes
from devguard.doors import table
from devguard.errors import ConfigError
from devguard.guards import unwind
from devguard.guards.base import Scope
from devguard.guards.parameter import Parameter
from devguard.modes import DoorMode, Mode
from devguard.ownership import in_force, unloaded
from devguard.ownership.owner import UNKNOWN, Owner, parse_owner
from devguard.ownership.prepare import prepare
from devguard.ownership.resolve import owner_from_environment, owner_not_found
from devguard.ownership.stack import local

__all__ = ["guard"]

_owners: dict[int, Owner] = {}  # for guard(1), which programs write in loops


class guard(Scope):
    """A scope in which a device owns all work: the current device is the owner's, and the doors are watched.

    Use it as a context manager or as a decorator of functions, methods, static and class methods,
    coroutines, generators and asynchronous generators. It may be nested and shared between threads.

    Parameters
    ----------
    device : int, str or torch.device, optional
        The owner: ``"cuda:1"``, ``1``, ``torch.device("cuda", 1)``, or ``"cpu"`` for code that owns no
        accelerator. Left out, it is `argument`, else `resolve`, else ``DEVGUARD_DEVICE``, else the
        launcher's local rank (``LOCAL_RANK``, ``SLURM_LOCALID``, ...), else the owner of the guard around
        this one.
    argument : str, optional
        For decorators: the name of the parameter of the decorated function that holds the device. Where a
        call passes None, the search goes on as above. After a device, the mode: ``guard("cuda:1", "warn")``.
    resolve : callable, optional
        Called without arguments at each entry; returns the device, or None for the search to go on.
    mode : {'off', 'observe', 'warn', 'repair', 'error'}, optional
        What the doors do with a stray. By default that of the scope around this one, else of the process, else
        ``'repair'``.
    doors : mapping of str to str, optional
        The mode of single doors, such as ``{"load": "warn"}``.

    Raises
    ------
    ConfigError
        For a mode or a door that does not exist, or a combination that is not valid.
    DeviceResolutionError
        For a device that cannot be owned. On entry, for a device that this process does not see, or if no device
        is found.

    Examples
    --------
    >>> @devguard.guard(argument="gpu_id")
    ... def run_worker(config, gpu_id): ...

    >>> with devguard.guard("cuda:1", mode="error"):
    ...     state = torch.load("checkpoint.pt")

    Notes
    -----
    The value of ``with guard(...) as device`` is the owner's ``torch.device``. Entering costs about as much
    as ``with torch.cuda.device(...)``; see benchmarks/.
    """

    __slots__ = ("_options", "_owner")
    _options: _Options | None
    _owner: Owner

    def __init__(
        self,
        device: Any = None,
        argument: str | None = None,
        resolve: Callable[[], Any] | None = None,
        mode: Mode | None = None,
        doors: Mapping[str, DoorMode] | None = None,
    ) -> None:
        if argument is None and resolve is None and mode is None and doors is None:
            self._options = None
            if device.__class__ is int and device in _owners:  # not True, nor numpy's integers, which are parsed
                self._owner = _owners[device]
                return
        else:
            argument, mode = _order(type(self).__name__, device, argument, mode)
            self._options = _check_options(device, argument, resolve, mode, doors)
        self._owner = owner = UNKNOWN if device is None else self._parse(device)
        if device.__class__ is int:
            _owners[device] = owner

    @classmethod
    def _parse(cls, device: Any) -> Owner:
        # A function or a class. Being callable is not enough: a torch.device is callable.
        if hasattr(device, "__get__") or isinstance(device, type):
            name = cls.__name__
            raise TypeError(
                f"@devguard.{name} needs parentheses: write @devguard.{name}() or @devguard.{name}('cuda:1')."
            )
        return parse_owner(device)

    def mode_of(self, door: str) -> DoorMode | None:
        """Return the mode that this scope sets for `door`, None where it leaves that to the scope around it."""
        options = self._options
        return None if options is None else options.doors.get(door, options.mode)

    def names(self, door: str) -> bool:
        """Return whether this scope sets the mode of `door` by its name."""
        return self._options is not None and door in self._options.doors

    def requests(self, door: str) -> bool:
        """Return whether this scope requests a door that acts on request only: by its name."""
        return self.names(door)

    @property
    def is_resolved(self) -> bool:
        """Whether the owner is known before a call."""
        return self._owner is not UNKNOWN

    def resolved(self, parameter: Parameter | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Scope:
        """Return this scope with its owner known, for one call of a decorated function."""
        if self._owner is not UNKNOWN:
            return self
        value = None if parameter is None else parameter.value(args, kwargs)
        if value is not None:
            assert parameter is not None
            owner = parse_owner(value, f"the argument {parameter.name}")
        else:
            owner = self._find("" if parameter is None else f"the argument {parameter.name} (None)")
        resolved = object.__new__(type(self))
        resolved._owner = owner
        resolved._options = self._options
        return resolved

    def _find(self, tried: str = "") -> Owner:
        """Find the owner of a guard without a device.

        Parameters
        ----------
        tried : str
            The argument of the decorated function and its value, for the error; empty where there is none.
        """
        options = self._options
        if options is not None and options.argument is not None and not tried:
            raise ConfigError(
                f"{self!r} takes its device from a function's argument, so it can only decorate a function. "
                "Elsewhere name the device itself."
            )
        if options is not None and options.resolve is not None:
            device = options.resolve()
            if device is not None:
                return parse_owner(device, f"what {getattr(options.resolve, '__qualname__', 'resolve')}() returned")
            tried = tried or "resolve() (None)"
        return self._search(tried)

    def _search(self, tried: str) -> Owner:
        found, looked = owner_from_environment()
        found = found or in_force.owner()
        if found is None:
            raise owner_not_found(looked, tried)
        return found

    def __enter__(self) -> Any:
        owner = self._owner
        device = owner.device
        if device is None:
            owner = self._prepare()
            device = owner.device
        stack = local.stack
        if stack and unwind.is_entered(stack, self):
            unwind.enter_again(self, owner, sys._getframe(1))
        else:
            stack.append((self, owner, stack.take(owner.index)))
        return device

    def _prepare(self) -> Owner:
        """Return the owner, found first if no device was named, and prepare this process for its first entry."""
        owner = self._find() if self._owner is UNKNOWN else self._owner
        if owner.device is None:
            table.open_all()
            unloaded.report()
            prepare(owner, self.mode_of)
        return owner

    @property
    def parameter(self) -> str | None:
        """The parameter of a decorated function that holds the device; None if none does."""
        return None if self._options is None else self._options.argument

    def _value(self) -> tuple[Any, ...]:
        options = self._options
        device = None if self._owner is UNKNOWN else self._owner.tag
        if options is None:
            return (device, None, None, None, ())
        doors = tuple(sorted(options.doors.items()))
        return (device, options.argument, options.resolve, options.mode, doors)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other._value() == self._value()

    def __hash__(self) -> int:
        return hash((type(self), self._value()))

    def __reduce__(self) -> tuple[Any, ...]:
        device, argument, resolve, mode, doors = self._value()
        return _make, (type(self), device, argument, resolve, mode, dict(doors) or None)

    def __repr__(self) -> str:
        device, *options = self._value()
        names = ("argument", "resolve", "mode", "doors")
        parts = [] if device is None else [repr(device)]
        parts += [f"{name}={dict(v) if name == 'doors' else v!r}" for name, v in zip(names, options, strict=True) if v]
        return f"devguard.{type(self).__name__}({', '.join(parts)})"


class _Options:
    """The rarer parameters of a guard, checked."""

    __slots__ = ("argument", "doors", "mode", "resolve")

    def __init__(
        self,
        argument: str | None,
        resolve: Callable[[], Any] | None,
        mode: Mode | None,
        doors: dict[str, DoorMode],
    ) -> None:
        self.argument = argument
        self.resolve = resolve
        self.mode = mode
        self.doors = doors


def _order(name: str, device: Any, argument: Any, mode: Any) -> tuple[Any, Any]:
    """Return `argument` and `mode`, where the second value of a call may be a mode: ``guard("cuda:1", "warn")``."""
    if device is None or not isinstance(argument, str):
        return argument, mode
    call = f"{name}({device!r}, {argument!r})"
    if isinstance(device, str) and device in modes.MODES:
        raise ConfigError(f"{call}: the device comes first, then the mode. Write {name}({argument!r}, {device!r}).")
    if argument not in modes.MODES:
        raise ConfigError(
            f"{call}: the device and the parameter {argument!r} each name the device. Give only one of them. A mode "
            f"comes second: {', '.join(modes.MODES)}."
        )
    if mode is not None:
        raise ConfigError(f"{call} names the mode twice, also by mode={mode!r}. Give it once.")
    return None, argument


def _check_options(device: Any, argument: Any, resolve: Any, mode: Any, doors: Any) -> _Options:
    named = [
        name for name, value in (("device", device), ("argument", argument), ("resolve", resolve)) if value is not None
    ]
    if len(named) > 1:
        raise ConfigError(f"{' and '.join(named)} each name the device. Give only one of them.")
    if argument is not None and not (isinstance(argument, str) and argument.isidentifier()):
        raise ConfigError(f"argument must be the name of a parameter, such as 'gpu_id'; got {argument!r}.")
    if resolve is not None and not callable(resolve):
        raise ConfigError(f"resolve must be a callable without arguments that returns a device; got {resolve!r}.")
    return _Options(
        argument,
        resolve,
        None if mode is None else modes.check_mode(mode),
        {} if doors is None else table.check_doors(doors),
    )


def _make(kind: type[guard], device: Any, argument: Any, resolve: Any, mode: Any, doors: Any) -> guard:
    return kind(device, argument=argument, resolve=resolve, mode=mode, doors=doors)
