"""The one place that calls ``torch.cuda``: exchange the current device, count devices, list contexts.

CUDA is the accelerator (ROCm builds of torch answer to the same names). Nothing here opens a context by
itself, and only `bind` imports torch. The functions that ask (`contexts`, `initialized`) never initialise
CUDA: a process that is merely looked at can still fork.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from typing import Any

from devguard.errors import DevGuardError, DeviceResolutionError

__all__ = [
    "bind",
    "bound_device",
    "can_access_peer",
    "contexts",
    "device_count",
    "index_of",
    "initialized",
    "out_of_range",
    "uuid_of",
]

TORCH_MINIMUM = (2, 6)

_CUDA_ERROR_NOT_INITIALIZED = 3


class MissingTorchError(DevGuardError, ImportError):
    """torch is needed now and is not installed, or is too old."""


def torch_module() -> Any:
    """Import torch, or say what to install."""
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise MissingTorchError(
            "devguard needs torch here and this environment has none. Install the build that fits your machine "
            "(see pytorch.org), or any build with: pip install 'torch-devguard[torch]'."
        ) from None
    version = tuple(int("".join(filter(str.isdigit, part)) or 0) for part in torch.__version__.split(".")[:2])
    if version < TORCH_MINIMUM:
        raise MissingTorchError(
            f"devguard supports torch {'.'.join(map(str, TORCH_MINIMUM))} and newer; this environment has "
            f"{torch.__version__}. Upgrade torch, or remove devguard from this program."
        )
    return torch


class Exchange:
    """The three calls that move the current device of this thread, as torch's C functions.

    Attributes
    ----------
    to : callable
        ``to(index) -> previous index``. Makes `index` current, and opens its context.
    back : callable
        ``back(index) -> previous index``. The same, but a device without a context stays without one.
    choose : callable
        ``choose(index) -> previous index``. As ``torch.cuda.set_device``: binds the context to a fresh
        thread.
    """

    __slots__ = ("back", "choose", "to")

    def __init__(self, to: Callable[[int], int], back: Callable[[int], int], choose: Callable[[int], int]) -> None:
        self.to = to
        self.back = back
        self.choose = choose


def bind() -> Exchange:
    """Find the exchange functions of the installed torch.

    Raises
    ------
    DeviceResolutionError
        If this build of torch has no CUDA.
    """
    torch = torch_module()
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

    return Exchange(to, back, choose)


def device_count() -> int:
    """Return how many CUDA devices this process sees; 0 without torch, without CUDA or without a driver."""
    torch = sys.modules.get("torch")
    if torch is None:
        return 0
    seen = getattr(torch._C, "_cuda_getDeviceCount", None)
    if seen is not None and torch.cuda.is_initialized():  # older torch counts what CUDA_VISIBLE_DEVICES means by now
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
    # below get_device_properties, which in older torch counts what CUDA_VISIBLE_DEVICES means by now
    return str(torch.cuda._get_device_properties(index).uuid)


def index_of(uuid: str) -> int | None:
    """Return the index under which this process sees the GPU with this UUID; None if it does not see it."""
    for index in range(device_count()):
        if uuid_of(index) == uuid:
            return index
    return None


def can_access_peer(index: int, peer: int) -> bool:
    """Tell whether the device `index` can reach the memory of the device `peer`; opens no context."""
    return bool(sys.modules["torch"].cuda.can_device_access_peer(index, peer))


def initialized() -> bool:
    """Tell whether the CUDA driver is initialised in this process, by anybody; asking does not initialise it."""
    try:
        driver = ctypes.CDLL("libcuda.so.1", mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    except OSError:
        return _torch_initialized()  # no driver is loaded (or it goes by another name: ROCm)
    count = ctypes.c_int()
    status: int = driver.cuDeviceGetCount(ctypes.byref(count))
    return status != _CUDA_ERROR_NOT_INITIALIZED


def bound_device() -> int | None:
    """Return the device whose context this thread has current; None if it has none, or if no driver can be asked.

    A thread has none before it first works on a device. Asking (``cuCtxGetDevice``) opens nothing. ROCm's driver goes
    by another name and is not asked.
    """
    if not _driver:
        try:
            _driver.append(ctypes.CDLL("libcuda.so.1", mode=os.RTLD_NOLOAD | os.RTLD_NOW))
        except OSError:
            return None
    device = ctypes.c_int()
    return None if _driver[0].cuCtxGetDevice(ctypes.byref(device)) else device.value


_driver: list[ctypes.CDLL] = []


def _torch_initialized() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.cuda.is_initialized())


_TORCHS_OWN_CHECK = "TORCH_CUDA_CHECK_STRAY_CONTEXT"
_torchs_own_check_was: list[str | None] = []


def set_torchs_own_check(mode: str) -> None:
    """Let torch's own check of contexts follow our mode, where torch has one (2.15); a value that the user set stays.

    Then ``torch.cuda.set_device`` warns or raises if it finds a context on another device. Children inherit it.
    """
    torch = torch_module()
    cached = getattr(torch.cuda, "_get_stray_context_mode", None)
    if (
        cached is None
        or mode not in ("warn", "error")
        or (os.environ.get(_TORCHS_OWN_CHECK) and not _torchs_own_check_was)
    ):
        return
    if not _torchs_own_check_was:
        _torchs_own_check_was.append(os.environ.get(_TORCHS_OWN_CHECK))
    os.environ[_TORCHS_OWN_CHECK] = mode
    cached.cache_clear()


def restore_torchs_own_check() -> None:
    """Put the variable back as it was."""
    if not _torchs_own_check_was:
        return
    was = _torchs_own_check_was.pop()
    if was is None:
        os.environ.pop(_TORCHS_OWN_CHECK, None)
    else:
        os.environ[_TORCHS_OWN_CHECK] = was
    sys.modules["torch"].cuda._get_stray_context_mode.cache_clear()


def contexts() -> tuple[int, ...]:
    """Return the indices of the devices on which this process holds a primary context; opens none.

    Source: ``torch._C._cuda_hasPrimaryContext``, which asks the driver (``cuDevicePrimaryCtxGetState``). A
    process in which nobody has initialised CUDA holds none, and is not asked further, because torch's own
    count would initialise the driver.
    """
    torch = sys.modules.get("torch")
    has_context = getattr(torch and torch._C, "_cuda_hasPrimaryContext", None)
    if torch is None or has_context is None or not (_torch_initialized() or initialized()):
        return ()
    if getattr(torch.cuda, "_is_in_bad_fork", lambda: False)():
        return ()  # forked after CUDA was initialised: this process can hold no context
    return tuple(index for index in range(device_count()) if has_context(index))
