"""The meaning of ``CUDA_VISIBLE_DEVICES``: which physical GPUs a value of the variable selects, by UUID.

CUDA reads the variable once, when the driver is initialised. These functions answer what its value at the start of the
program meant, and what its value means now. NVML lists the GPUs of the machine; NVML touches no CUDA. The meaning is
unknown without NVML (ROCm, Jetson), with MIG, and where plain numbers may count in another order than NVML's.
"""

from __future__ import annotations

import ctypes
import functools
import os
from typing import NamedTuple

from devguard.support import accelerator

__all__ = ["Gpu", "list_gpus", "list_visible", "meant_now", "read_visible", "VARIABLE", "visible_at_start"]

VARIABLE = "CUDA_VISIBLE_DEVICES"


class Gpu(NamedTuple):
    """A GPU of this machine, as NVML knows it.

    Attributes
    ----------
    uuid : str
        Its UUID in torch's spelling, without ``GPU-``.
    name : str
        Its model.
    """

    uuid: str
    name: str


def list_visible() -> list[str]:
    """Return the UUIDs of the devices that this process sees, by index; initialises CUDA, and opens no context."""
    return [accelerator.uuid_of(index) for index in range(accelerator.device_count())]


@functools.cache
def visible_at_start() -> str | None:
    """Return the value with which this program was started; the current value where the system has no ``/proc``."""
    try:
        with open("/proc/self/environ", "rb") as file:
            rows = (row.partition(b"=") for row in file.read().split(b"\0"))
            return next((os.fsdecode(value) for name, _, value in rows if name == VARIABLE.encode()), None)
    except OSError:
        return os.environ.get(VARIABLE)


def meant_now(gpus: list[Gpu], visible: list[str]) -> list[str] | None:
    """Return the UUIDs of the devices that the variable means now, in order.

    Plain numbers count either in the order of the PCI bus, as NVML does, or with the fastest GPU first. The order is
    known to be NVML's if the value at the start explains what this process sees, or if both orders are the same.

    Parameters
    ----------
    gpus : list of Gpu
        The GPUs of this machine, as `list_gpus` returns them.
    visible : list of str
        The UUIDs of the devices that this process sees, as `list_visible` returns them.

    Returns
    -------
    list of str or None
        None if the variable was not changed since the start, or if its meaning is unknown.
    """
    now, start = os.environ.get(VARIABLE), visible_at_start()
    if not gpus or now == start or (now or "").startswith("MIG-") or not {gpu.uuid for gpu in gpus}.issuperset(visible):
        return None
    is_nvml_order = (
        (now or "").startswith("GPU-")
        or os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
        or len({gpu.name for gpu in gpus}) == 1
        or read_visible(start, gpus) == visible
    )
    return read_visible(now, gpus) if is_nvml_order else None


def read_visible(value: str | None, gpus: list[Gpu]) -> list[str]:
    """Return the UUIDs of the devices that a value of the variable selects, read as the driver reads it.

    An entry that names no device hides all entries from there on; a device that is named twice hides all devices.

    Parameters
    ----------
    value : str or None
        The value; None if the variable is not set.
    gpus : list of Gpu
        The GPUs of the machine, in the driver's order.
    """
    if value is None:
        return [gpu.uuid for gpu in gpus]
    meant: list[str] = []
    for word in map(str.strip, value.split(",")):
        if word.startswith("GPU-"):
            found = [gpu.uuid for gpu in gpus if gpu.uuid.startswith(word[4:])]
        else:
            found = [gpus[int(word)].uuid] if word.isdecimal() and int(word) < len(gpus) else []
        if len(found) != 1:
            break
        if found[0] in meant:
            return []
        meant += found
    return meant


def list_gpus() -> list[Gpu]:
    """Return the GPUs of this machine in NVML's order; empty without NVML."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        if nvml.nvmlInit_v2():
            return []
    except (AttributeError, OSError):
        return []
    try:
        count, gpus = ctypes.c_uint(), []
        if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)):
            return []
        for number in range(count.value):
            handle, texts = ctypes.c_void_p(), []
            if nvml.nvmlDeviceGetHandleByIndex_v2(number, ctypes.byref(handle)):
                return []
            for query in (nvml.nvmlDeviceGetUUID, nvml.nvmlDeviceGetName):
                text = ctypes.create_string_buffer(96)
                if query(handle, text, len(text)):
                    return []
                texts.append(text.value.decode(errors="replace"))
            gpus.append(Gpu(texts[0].removeprefix("GPU-"), texts[1]))
        return gpus
    finally:
        nvml.nvmlShutdown()
