"""The door ``visibility``: an index that does not mean the physical GPU that its author thinks it does.

Two ways, both looked at when an owner is entered for the first time, and never afterwards:

- ``CUDA_VISIBLE_DEVICES`` was changed after CUDA had looked. CUDA reads it once, when the driver is initialised: the
  devices that this process sees are compared, by UUID, with those that the variable means now. It is a stray if the
  owner's index means another GPU, or none.
- Two ranks of one job, or two children of one parent that were told different things, own one physical GPU: a rank used
  as an index although the visible devices differ. Each process claims its GPU in a file (gpu_claims.py); the later one
  records the stray. ``DEVGUARD_RANK_LOCK=off`` switches that off. Everybody else may share a GPU (a trainer and its
  engine, MPS, test workers): `status` mentions them.

Nothing can be repaired: CUDA cannot look again, and devguard does not choose devices. Mode ``error`` refuses the guard.

`status` gives the UUID and the NVML index of each device that this process sees; NVML and nvidia-smi count all GPUs of
the machine, in the order of the PCI bus. Without NVML (ROCm, Jetson), with MIG, or where plain numbers may count in
another order than NVML's (GPUs of different models without ``CUDA_DEVICE_ORDER=PCI_BUS_ID``), nothing is said of a
changed variable, and nothing of a change by C code. One that is made before CUDA looks, or that leaves the owner its
GPU, is no stray.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from devguard.doors.contexts import gpu_claims
from devguard.errors import StrayDeviceError
from devguard.modes import DoorMode
from devguard.ownership import in_force
from devguard.ownership.owner import Owner, owned_tags
from devguard.ownership.prepare import on_prepare
from devguard.reporting.allowlist import is_allowed
from devguard.reporting.journal import journal
from devguard.reporting.stray import LEFT
from devguard.support import accelerator
from devguard.support.callsite import Site

__all__ = ["install", "status", "uninstall"]

NAME = "visibility"

VARIABLE = "CUDA_VISIBLE_DEVICES"

_problem: str | None = None
_ADVICE_CHANGED = f"Set {VARIABLE} before anything touches CUDA, or start a new process with it."
_ADVICE_SHARED = (
    f"Give each rank its own GPU: the index counts the devices in {VARIABLE}, not those of the machine. If they are to "
    f"share it, set doors={{'{NAME}': 'off'}} or {gpu_claims.VARIABLE}=off."
)


class _Gpu(NamedTuple):
    """A GPU of this machine, as NVML knows it."""

    uuid: str
    name: str


def install() -> None:
    """Look at each owner before it is entered for the first time."""
    global _problem
    _problem = None
    if _look not in on_prepare:
        on_prepare.append(_look)


def uninstall() -> list[str]:
    """Look no more, and take back the claims."""
    if _look in on_prepare:
        on_prepare.remove(_look)
    gpu_claims.release()
    return []


def status() -> dict[str, Any]:
    """Return which physical GPUs this process sees, and who else owns those that it owns. Initialises nothing."""
    row: dict[str, Any] = {"visible_now": os.environ.get(VARIABLE), "visible_at_start": _at_start()}
    torch: Any = sys.modules["torch"]
    try:
        row["claims"] = str(gpu_claims.folder()) if gpu_claims.enabled() else "off"
        if torch.cuda.is_initialized() and not torch.cuda._is_in_bad_fork():
            gpus, seen = _gpus(), _seen()
            numbers = {gpu.uuid: number for number, gpu in enumerate(gpus)}
            row["devices"] = {
                f"cuda:{index}": {"uuid": uuid, "nvml_index": numbers.get(uuid)} for index, uuid in enumerate(seen)
            }
            meant = _meant_now(gpus, seen)
            if meant is not None and meant != seen:
                row["changed"] = f"{VARIABLE} now means other devices than those that CUDA saw when it looked"
            if gpu_claims.enabled():
                row["shared_with"] = {
                    tag: [str(claim) for claim in gpu_claims.others(seen[int(tag[5:])])]
                    for tag in owned_tags()
                    if tag != "cpu"
                }
    except (AssertionError, AttributeError, OSError, RuntimeError) as error:
        row["problem"] = f"{type(error).__name__}: {error}"
    if _problem:
        row["problem"] = _problem
    return row


def _look(owner: Owner, says: Callable[[str], DoorMode | None]) -> None:
    """Look at an owner that is about to be entered for the first time."""
    global _problem
    mode = says(NAME) or in_force.mode_of(NAME)
    if owner.index < 0 or mode == "off" or is_allowed(owner.tag):
        return
    shared: str | None = None
    try:
        had_looked = accelerator.initialized()
        uuid = accelerator.uuid_of(owner.index)
        changed = _change(owner, uuid) if had_looked else None
        if gpu_claims.enabled():
            for other in gpu_claims.claim(uuid, owner.index):
                why = gpu_claims.clash(other, owner.index)
                if why is not None:
                    shared = f"cuda:{owner.index} is GPU {uuid}, which {why} owns too: {other}"
                    break
    except (AssertionError, AttributeError, OSError, RuntimeError) as error:
        _problem = f"{type(error).__name__}: {error}"  # looking must not keep anybody from working
        return
    if changed is not None:
        _report(owner, uuid, mode, changed, _ADVICE_CHANGED)
    if shared is not None:
        _report(owner, uuid, mode, shared, _ADVICE_SHARED)


def _report(owner: Owner, uuid: str, mode: DoorMode, note: str, advice: str) -> None:
    source = f"GPU-{uuid}"
    action = "refused" if mode == "error" else LEFT.get(mode, "observed")
    site = journal.record(NAME, source, source, owner.tag, action, 0, note=note)
    if mode == "error":
        where = Site.of(site) if site else "no line of user code (see the stack in devguard.strays())"
        raise StrayDeviceError(f"{NAME}: {note}. Call site: {where}. {advice}")


def _change(owner: Owner, uuid: str) -> str | None:
    """Say what a change of the variable after CUDA had looked means for `owner`; None if nothing."""
    now = os.environ.get(VARIABLE)
    if now == _at_start():
        return None
    gpus = _gpus()
    meant = _meant_now(gpus, _seen())
    here = next((number for number, gpu in enumerate(gpus) if gpu.uuid == uuid), None)
    if meant is None or here is None or meant[owner.index : owner.index + 1] == [uuid]:
        return None
    if owner.index < len(meant):
        other = meant[owner.index]
        would = f"GPU {other}, NVML index {[gpu.uuid for gpu in gpus].index(other)}"
    else:
        would = "no device at all"
    value = "unset" if now is None else f"set to {now!r}"
    what = f"{owner.tag} is GPU {uuid}, NVML index {here}, and would be {would}"
    return f"{VARIABLE} was {value} after CUDA had looked: {what}"


def _seen() -> list[str]:
    return [accelerator.uuid_of(index) for index in range(accelerator.device_count())]


@functools.cache
def _at_start() -> str | None:
    """Return the variable as this program was started with it; as Python has it now, where the system does not say."""
    try:
        with open("/proc/self/environ", "rb") as file:
            rows = (row.partition(b"=") for row in file.read().split(b"\0"))
            return next((os.fsdecode(value) for name, _, value in rows if name == VARIABLE.encode()), None)
    except OSError:
        return os.environ.get(VARIABLE)


def _meant_now(gpus: list[_Gpu], seen: list[str]) -> list[str] | None:
    """Return the UUIDs of the devices that the changed variable means, in order; None where that cannot be told.

    Plain numbers count in the order of the PCI bus, as NVML's, or with the fastest GPU first. It is the former if the
    variable of old explains what this process sees, or where there is no difference.
    """
    now, start = os.environ.get(VARIABLE), _at_start()
    if not gpus or now == start or (now or "").startswith("MIG-") or not {gpu.uuid for gpu in gpus}.issuperset(seen):
        return None
    one_order = (
        (now or "").startswith("GPU-")
        or os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
        or len({gpu.name for gpu in gpus}) == 1
        or _read(start, gpus) == seen
    )
    return _read(now, gpus) if one_order else None


def _read(text: str | None, gpus: list[_Gpu]) -> list[str]:
    """Read a value of the variable as the driver does, with `gpus` in its order.

    An entry that names no device hides itself and all that follow; a device that is named twice hides everything.
    """
    if text is None:
        return [gpu.uuid for gpu in gpus]
    meant: list[str] = []
    for word in map(str.strip, text.split(",")):
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


def _gpus() -> list[_Gpu]:
    """Return the GPUs of this machine in NVML's order; empty without NVML. Touches no CUDA."""
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
            for ask in (nvml.nvmlDeviceGetUUID, nvml.nvmlDeviceGetName):
                text = ctypes.create_string_buffer(96)
                if ask(handle, text, len(text)):
                    return []
                texts.append(text.value.decode(errors="replace"))
            gpus.append(_Gpu(texts[0].removeprefix("GPU-"), texts[1]))
        return gpus
    finally:
        nvml.nvmlShutdown()
