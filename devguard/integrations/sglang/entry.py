"""Guard workers from the program that starts them: a decorator for entry points, and an engine that applies it."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, overload

from devguard import modes
from devguard.activation import environment
from devguard.errors import ConfigError, DeviceResolutionError
from devguard.guards.guard import guard
from devguard.integrations.sglang import host_transport, roles, versions
from devguard.modes import DoorMode, Mode

__all__ = ["guarded_engine", "worker"]

Function = TypeVar("Function", bound=Callable[..., Any])
Engine = TypeVar("Engine", bound=type)

# Parts of the names of entry points that run in processes without a GPU, which receive every request.
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
    """Guard the entry point of a worker process, whatever the names and the order of its parameters.

    The owner is the argument ``gpu_id``, else ``local_rank``, ``device_id``, ``device_index`` or ``device``. Entry
    points of SGLang's data-parallel controller and detokenizer own ``cpu``. `arm` sets the owners of the processes
    that the function itself starts.

    Parameters
    ----------
    function : callable
        A module-level function. It stays a plain function, because a spawned process finds it by name.
    device : int, str or torch.device, optional
        The owner, if no argument names it.
    mode : {'off', 'observe', 'warn', 'repair', 'error'}, optional
        What the doors do with a stray.
    doors : mapping of str to str, optional
        The mode of single doors.

    Raises
    ------
    DeviceResolutionError
        If no parameter can hold a device.
    ConfigError
        If a mode or a door does not exist.

    Examples
    --------
    >>> @devguard.integrations.sglang.worker
    ... def run_scheduler(server_args, port_args, gpu_id, tp_rank, pipe): ...
    """
    if function is None:
        return functools.partial(worker, device=device, mode=mode, doors=doors)
    if not callable(function):
        raise ConfigError(f"worker decorates a function, not {function!r}. To name a device: worker(device=...).")
    name = getattr(function, "__name__", "")
    if device is None and any(part in name for part in WITHOUT_GPU):
        device = "cpu"
    if device is None:
        _check_parameters(function, name)
    else:
        guard(device)  # Raises now if the device is invalid.
    guard("cpu", mode=mode, doors=doors)  # Raises now if the mode or a door is invalid.

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
            f"{name or repr(function)} has no parameter that names its GPU. Looked for: "
            f"{', '.join(roles.DEVICE_ARGUMENTS)}; it has: {', '.join(parameters) or 'none'}. Name the owner instead: "
            "worker(device=...)."
        )


class _Entry:
    """An entry point that is guarded in the process that unpickles it.

    It pickles by the name of the function, not as a decorated function, which pickle would not find under that name.
    Unpickling arms the integration, so a data-parallel controller that only receives the entry point, to start
    schedulers with, owns ``cpu`` too.
    """

    def __init__(self, function: Callable[..., Any], options: dict[str, Any], budget: int | None = None) -> None:
        self.function = function
        self.options = options
        self.budget = budget  # With transport="host"; otherwise None.
        functools.update_wrapper(self, function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return worker(**self.options)(self.function)(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrive, (self.function, self.options, self.budget)


def _arrive(function: Callable[..., Any], options: dict[str, Any], budget: int | None = None) -> _Entry:
    roles.arm()
    if budget is not None:
        host_transport.arm(budget, everywhere=False)
    return _Entry(function, options, budget)


def guarded_engine(
    engine: Engine,
    *,
    mode: Mode | None = None,
    doors: Mapping[str, DoorMode] | None = None,
    transport: str | None = None,
) -> Engine:
    """Return a subclass of SGLang's ``Engine`` with guarded processes.

    Parameters
    ----------
    engine : type
        ``sglang.Engine``, or a subclass.
    mode : {'off', 'observe', 'warn', 'repair', 'error'}, optional
        What the doors do with a stray in the schedulers; ``'repair'`` by default.
    doors : mapping of str to str, optional
        The mode of single doors there.
    transport : {'host'}, optional
        Send the multimodal tensors of this engine through `devguard.transport` (experimental), as
        ``DEVGUARD_TRANSPORT=host`` does for all; its budget is ``DEVGUARD_TRANSPORT_BUDGET``.

    Raises
    ------
    UnsupportedVersionError
        If devguard does not support the installed release of SGLang.
    ConfigError
        If the entry points of the class cannot be replaced, as in older releases, or `transport` is not valid or not
        possible with the installed release.

    Examples
    --------
    >>> Engine = devguard.integrations.sglang.guarded_engine(sglang.Engine)
    >>> engine = Engine(model_path=..., tp_size=2)
    """
    if hasattr(engine, "module_name") and hasattr(engine, "class_name"):  # sglang.Engine is a lazy proxy of the class.
        engine = getattr(importlib.import_module(engine.module_name), engine.class_name)
    if not isinstance(engine, type):
        raise ConfigError(f"guarded_engine takes a class such as sglang.Engine, not {engine!r}.")
    versions.check()
    budget = None
    if transport is not None and environment.parse_transport(transport, "transport") == "host":
        host_transport.require()
        budget = environment.read().budget
    options = {"mode": mode, "doors": None if doors is None else dict(doors)}
    replaced: dict[str, Any] = {}
    for name in ENTRY_POINTS:
        function = getattr(engine, name, None)
        if function is not None:
            kept = function if isinstance(function, _Entry) else _Entry(function, options, budget)
            if budget is not None:
                kept.budget = budget
            replaced[name] = staticmethod(kept)
    if ENTRY_POINTS[0] not in replaced:
        raise ConfigError(
            f"{engine.__name__} of SGLang {versions.installed()} has no run_scheduler_process_func to replace. Set "
            "DEVGUARD=repair in the environment instead; the program needs no change."
        )
    members = {**replaced, "__module__": engine.__module__, "__doc__": engine.__doc__}
    if budget is not None and not modes.is_killed():
        host_transport.arm(budget, everywhere=False)
        members["__init__"] = _init_with_transport(engine)
    subclass: Engine = type(engine)(engine.__name__, (engine,), members)
    return subclass


def _init_with_transport(engine: Any) -> Callable[..., None]:
    """Return a constructor of an engine that sends through an arena."""
    original = engine.__init__

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        with host_transport.requested():
            original(self, *args, **kwargs)

    return init
