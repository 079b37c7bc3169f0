"""Guarding workers from the program that starts them: a decorator for their entry points, and an engine that has it."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, overload

from devguard.errors import ConfigError, DeviceResolutionError
from devguard.guards.guard import guard
from devguard.integrations.sglang import roles, versions
from devguard.modes import DoorMode, Mode

__all__ = ["guarded_engine", "worker"]

Function = TypeVar("Function", bound=Callable[..., Any])
Engine = TypeVar("Engine", bound=type)

# entry points of processes that receive every request and own no GPU
WITHOUT_GPU = ("data_parallel_controller", "detokenizer")
ENTRY_POINTS = ("run_scheduler_process_func", "run_detokenizer_process_func")


@overload
def worker(function: Function) -> Function: ...
@overload
def worker(
    *, device: Any = None, mode: Mode | None = None, doors: Mapping[str, DoorMode] | None = None
) -> Callable[[Function], Function]: ...
def worker(
    function: Any = None,
    *,
    device: Any = None,
    mode: Mode | None = None,
    doors: Mapping[str, DoorMode] | None = None,
) -> Any:
    """Guard the entry point of a worker process, whatever its parameters are called and in which order they come.

    The owner is the argument ``gpu_id``, else ``local_rank``, ``device_id``, ``device_index`` or ``device``. Entry
    points of SGLang's data-parallel controller and detokenizer own ``cpu``. What the function itself starts is told its
    owner by `arm`.

    Parameters
    ----------
    function : callable
        A function of a module, which stays a plain function: a spawned process finds it by its name.
    device : int, str or torch.device, optional
        The owner, where no argument names it.
    mode : {'off', 'observe', 'warn', 'repair', 'error'}, optional
        What the doors do with a stray.
    doors : mapping of str to str, optional
        The mode of single doors.

    Raises
    ------
    DeviceResolutionError
        If no parameter can hold a device.
    ConfigError
        For a mode or a door that does not exist.

    Examples
    --------
    >>> @devguard.integrations.sglang.worker
    ... def run_scheduler(server_args, port_args, gpu_id, tp_rank, pipe): ...
    """
    if function is None:
        return functools.partial(worker, device=device, mode=mode, doors=doors)
    if not callable(function):
        raise ConfigError(f"worker decorates a function, not {function!r}; a device goes by name: worker(device=...).")
    name = getattr(function, "__name__", "")
    if device is None and any(part in name for part in WITHOUT_GPU):
        device = "cpu"
    if device is None:
        _check_parameters(function, name)
    else:
        guard(device)  # says now what is wrong with it
    guard("cpu", mode=mode, doors=doors)  # likewise

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        roles.arm()
        owner = device
        if owner is None:
            owner = roles.device_argument(roles.bound(function, args, kwargs))
        with guard(owner, mode=mode, doors=doors):
            return function(*args, **kwargs)

    return guarded


def _check_parameters(function: Callable[..., Any], name: str) -> None:
    parameters = inspect.signature(function).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    if not takes_any and not set(roles.DEVICE_ARGUMENTS) & set(parameters):
        raise DeviceResolutionError(
            f"{name or repr(function)} has no parameter that could name its GPU. Looked for: "
            f"{', '.join(roles.DEVICE_ARGUMENTS)}; it has: {', '.join(parameters) or 'none'}. Give the owner itself: "
            "worker(device=...)."
        )


class _Entry:
    """An entry point that is guarded in the process that it arrives in.

    It pickles by the name of the function, not as a decorated function, which pickle would not find under that name.
    Where it arrives it arms the integration: so a data-parallel controller that is only given it, to start schedulers
    with, owns ``cpu`` too.
    """

    def __init__(self, function: Callable[..., Any], options: dict[str, Any]) -> None:
        self.function = function
        self.options = options
        functools.update_wrapper(self, function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return worker(**self.options)(self.function)(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrive, (self.function, self.options)


def _arrive(function: Callable[..., Any], options: dict[str, Any]) -> _Entry:
    roles.arm()
    return _Entry(function, options)


def guarded_engine(engine: Engine, *, mode: Mode | None = None, doors: Mapping[str, DoorMode] | None = None) -> Engine:
    """Return a subclass of SGLang's ``Engine`` whose processes are guarded.

    Parameters
    ----------
    engine : type
        ``sglang.Engine``, or a subclass.
    mode : {'off', 'observe', 'warn', 'repair', 'error'}, optional
        What the doors do with a stray in the schedulers; ``'repair'`` by default.
    doors : mapping of str to str, optional
        The mode of single doors there.

    Raises
    ------
    UnsupportedVersionError
        For a release of SGLang that devguard does not know.
    ConfigError
        If the class does not let its entry points be replaced, as in older releases.

    Examples
    --------
    >>> Engine = devguard.integrations.sglang.guarded_engine(sglang.Engine)
    >>> engine = Engine(model_path=..., tp_size=2)
    """
    if hasattr(engine, "module_name") and hasattr(engine, "class_name"):  # sglang.Engine is only a promise of the class
        engine = getattr(importlib.import_module(engine.module_name), engine.class_name)
    if not isinstance(engine, type):
        raise ConfigError(f"guarded_engine takes the class, sglang.Engine, not {engine!r}.")
    versions.check()
    options = {"mode": mode, "doors": None if doors is None else dict(doors)}
    replaced: dict[str, Any] = {}
    for name in ENTRY_POINTS:
        function = getattr(engine, name, None)
        if function is not None:
            kept = function if isinstance(function, _Entry) else _Entry(function, options)
            replaced[name] = staticmethod(kept)
    if ENTRY_POINTS[0] not in replaced:
        raise ConfigError(
            f"{engine.__name__} of SGLang {versions.installed()} has no run_scheduler_process_func to replace. Start "
            "the program with DEVGUARD=repair instead; it needs no line of code."
        )
    members = {**replaced, "__module__": engine.__module__, "__doc__": engine.__doc__}
    subclass: Engine = type(engine)(engine.__name__, (engine,), members)
    return subclass
