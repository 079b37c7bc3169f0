"""The one place, with allocator.py and context_check.py, that calls ``torch.cuda``: devices and their contexts.

CUDA is the accelerator (ROCm builds of torch have the same names). A function opens a context only if its docstring
says so, and only `bind` imports torch. Queries about contexts never initialise CUDA, so that the process can still
fork. Doors patch functions of ``torch.cuda``, but call them here; hot paths bind `queries`. The demo (devguard.demo)
plays a user's program and calls torch itself.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from typing import Any

from devguard.errors import DeviceResolutionError
from devguard.support.installed_torch import import_torch

__all__ = [
    "bind",
    "bound_device",
    "call_when_initialized",
    "can_access_peer",
    "contexts",
    "current_device",
    "current_device_after_init",
    "device_0_is_unchosen",
    "device_count",
    "driver_is_initialized",
    "Exchange",
    "has_context",
    "index_named",
    "index_of",
    "is_in_bad_fork",
    "is_initialized",
    "name_of",
    "out_of_range",
    "queries",
    "unwatched_set_device",
    "uuid_of",
]

_CUDA_ERROR_NOT_INITIALIZED = 3


class Exchange:
    """The calls that move the current device of this thread, and the one that reads it, as torch's C functions.

    Attributes
    ----------
    to : callable
        ``to(index) -> previous index``. Makes a device current, and opens its context.
    back : callable
        ``back(index) -> previous index``. The same, but a device without a context stays without one.
    choose : callable
        ``choose(index) -> previous index``. As ``torch.cuda.set_device``: binds the context to a fresh thread.
    read : callable
        ``read() -> index``. The current device.
    """

    __slots__ = ("back", "choose", "read", "to")

    def __init__(
        self,
        to: Callable[[int], int],
        back: Callable[[int], int],
        choose: Callable[[int], int],
        read: Callable[[], int],
    ) -> None:
        self.to = to
        self.back = back
        self.choose = choose
        self.read = read


def bind() -> Exchange:
    """Find the exchange functions of the installed torch.

    Raises
    ------
    DeviceResolutionError
        If this build of torch has no CUDA.
    """
    torch = import_torch()
    to = getattr(torch._C, "_cuda_exchangeDevice", None)
    back = getattr(torch._C, "_cuda_maybeExchangeDevice", None)
    if to is None or back is None:
        raise DeviceResolutionError(
            f"this process cannot own a GPU: torch {torch.__version__} is built without CUDA. Install a CUDA build, "
            "own 'cpu', or try simulated GPUs: devguard sim --gpus 2 -- python ..."
        )

    def choose(index: int) -> int:
        previous: int = torch._C._cuda_getDevice()
        torch._C._cuda_setDevice(index)  # what set_device calls; torch's own check of contexts is for users' calls
        return previous

    return Exchange(to, back, choose, torch._C._cuda_getDevice)


def device_count() -> int:
    """Return how many CUDA devices this process sees; 0 without torch, without CUDA or without a driver."""
    torch = sys.modules.get("torch")
    if torch is None:
        return 0
    seen = getattr(torch._C, "_cuda_getDeviceCount", None)
    if seen is not None and torch.cuda.is_initialized():  # older torch re-reads CUDA_VISIBLE_DEVICES at each call
        return int(seen())
    count: int = torch.cuda.device_count()
    return count


def out_of_range(what: str, index: int) -> DeviceResolutionError:
    """Return the error for a device that this process does not see; it names ``CUDA_VISIBLE_DEVICES``."""
    count = device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    setting = "CUDA_VISIBLE_DEVICES is not set" if visible is None else f"CUDA_VISIBLE_DEVICES={visible!r}"
    if count == 0:
        valid = "no CUDA device is visible"
    elif count == 1:
        valid = "one device is visible, cuda:0"
    else:
        valid = f"{count} devices are visible, cuda:0 to cuda:{count - 1}"
    return DeviceResolutionError(
        f"{what} names cuda:{index}, but {valid} ({setting}). Indices count the visible devices from 0, not the "
        "physical ones."
    )


def uuid_of(index: int) -> str:
    """Return the UUID of a visible device, in torch's spelling; initialises CUDA, and opens no context."""
    torch = sys.modules["torch"]
    torch.cuda.init()
    # Not get_device_properties, which in older torch re-reads CUDA_VISIBLE_DEVICES at each call.
    return str(torch.cuda._get_device_properties(index).uuid)


def name_of(index: int) -> str:
    """Return the name of a visible device, such as ``"NVIDIA H100"``; initialises CUDA."""
    return str(sys.modules["torch"].cuda.get_device_name(index))


def index_of(uuid: str) -> int | None:
    """Return the index under which this process sees the GPU with this UUID; None if it does not see it."""
    for index in range(device_count()):
        if uuid_of(index) == uuid:
            return index
    return None


def can_access_peer(index: int, peer: int) -> bool:
    """Return whether the device `index` can access the memory of the device `peer`; opens no context."""
    return bool(sys.modules["torch"].cuda.can_device_access_peer(index, peer))


def driver_is_initialized() -> bool:
    """Return whether the CUDA driver is initialised in this process, by torch or by a library; initialises nothing."""
    driver = _loaded_driver()
    if driver is None:
        return is_initialized()
    count = ctypes.c_int()
    status: int = driver.cuDeviceGetCount(ctypes.byref(count))
    return status != _CUDA_ERROR_NOT_INITIALIZED


def bound_device() -> int | None:
    """Return the device of this thread's current context; None before its first work on a device, and on ROCm.

    The query (``cuCtxGetDevice``) opens nothing. ROCm's driver has another name and is not queried.
    """
    driver = _loaded_driver()
    device = ctypes.c_int()
    return None if driver is None or driver.cuCtxGetDevice(ctypes.byref(device)) else device.value


_found: list[ctypes.CDLL] = []  # the driver, which stays loaded


def _loaded_driver() -> ctypes.CDLL | None:
    """Return the CUDA driver; None if this process has not loaded it, or if it has another name (ROCm)."""
    if not _found:
        try:
            _found.append(ctypes.CDLL("libcuda.so.1", mode=os.RTLD_NOLOAD | os.RTLD_NOW))
        except OSError:
            return None
    return _found[0]


def is_initialized() -> bool:
    """Return whether torch has initialised CUDA in this process."""
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.cuda.is_initialized())


def is_in_bad_fork() -> bool:
    """Return whether this process was forked after CUDA was initialised, so that it cannot use CUDA."""
    check = getattr(sys.modules["torch"].cuda, "_is_in_bad_fork", None)
    return check is not None and bool(check())


def current_device() -> int:
    """Return the current device of this thread; initialises no CUDA in torch, and opens no context."""
    index: int = sys.modules["torch"]._C._cuda_getDevice()
    return index


def current_device_after_init() -> int:
    """Return the current device of this thread, as ``torch.cuda.current_device``: initialises CUDA."""
    index: int = sys.modules["torch"].cuda.current_device()
    return index


def index_named(device: Any) -> int:
    """Return the index that torch reads from `device`, -1 if there is none; torch raises if it is no CUDA device."""
    index: int = sys.modules["torch"].cuda._utils._get_device_index(device, optional=True)
    return index


def device_0_is_unchosen() -> bool:
    """Return whether device 0 is current on this thread only by default: it holds no context.

    Then nothing can be pending on device 0, and a call that opens it does harm. The result is False in a forked child
    that cannot query contexts: the call itself then fails with torch's own error.
    """
    torch_c = sys.modules["torch"]._C
    try:
        return bool(torch_c._cuda_getDevice() == 0 and not torch_c._cuda_hasPrimaryContext(0))
    except RuntimeError:
        return False


def queries() -> tuple[Callable[[], int], Callable[[], bool]]:
    """Return torch's own functions behind `current_device` and `is_initialized`, for hot paths to bind."""
    torch = sys.modules["torch"]
    return torch._C._cuda_getDevice, torch.cuda.is_initialized


def unwatched_set_device() -> Callable[[int], None] | None:
    """Return torch's C function behind ``set_device``, without the door's patch; None in a build without CUDA."""
    function = getattr(sys.modules["torch"]._C, "_cuda_setDevice", None)
    unwatched: Callable[[int], None] | None = getattr(function, "__wrapped__", function)
    return unwatched


def call_when_initialized(function: Callable[[], object]) -> None:
    """Call `function` once at the end of the initialisation of CUDA that is due, or under way on this thread.

    As ``torch.cuda._lazy_call``, but torch may hold the lock of that function now: a call into CUDA before the end of
    the initialisation would wait forever.
    """
    queue = getattr(sys.modules.get("torch"), "cuda", None)
    if queue is not None and (function, []) not in queue._queued_calls:
        queue._queued_calls.append((function, []))


def has_context(index: int) -> bool:
    """Return whether this process, which has initialised CUDA, holds a context on a device; opens none."""
    return bool(sys.modules["torch"]._C._cuda_hasPrimaryContext(index))


def contexts() -> tuple[int, ...]:
    """Return the indices of the devices on which this process holds a primary context; opens none.

    Source: ``torch._C._cuda_hasPrimaryContext``, which queries the driver (``cuDevicePrimaryCtxGetState``). A process
    that has not initialised CUDA holds no context, and torch's own count of devices would initialise the driver.
    """
    torch = sys.modules.get("torch")
    has_context = getattr(torch and torch._C, "_cuda_hasPrimaryContext", None)
    if has_context is None or not (is_initialized() or driver_is_initialized()) or is_in_bad_fork():
        return ()
    return tuple(index for index in range(device_count()) if has_context(index))
