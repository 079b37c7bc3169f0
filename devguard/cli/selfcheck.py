"""Run the checks of ``devguard doctor`` that need torch, and print one JSON object.

The doctor runs ``python -m devguard.cli.selfcheck`` as a child process. The check unpickles a tagged storage under a
guard, so it may open a context on the device that it uses as owner. The context is closed when this process exits.
"""

from __future__ import annotations

import ctypes
import io
import json
import pickle
import sys
import traceback
from collections import OrderedDict
from typing import Any

import devguard
from devguard.errors import DevGuardError
from devguard.ownership.resolve import owner_from_environment
from devguard.support import accelerator

__all__ = ["examine", "tagged_pickle"]

VALUES = [float(number) for number in range(8)]


class _TaggedStorage:
    """Pickles like a torch storage, with a device tag of our choice."""

    def __init__(self, legacy: bytes) -> None:
        self.legacy = legacy

    def __reduce__(self) -> tuple[Any, tuple[bytes]]:
        import torch

        return torch.storage._load_from_bytes, (self.legacy,)


class _TaggedTensor:
    """Pickles like a torch tensor."""

    def __init__(self, storage: _TaggedStorage) -> None:
        self.storage = storage

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        import torch

        shape, stride = (len(VALUES),), (1,)
        return torch._utils._rebuild_tensor_v2, (self.storage, 0, shape, stride, False, OrderedDict())


def tagged_pickle(tag: str) -> bytes:
    """Return the pickle of a tensor of eight float32 with the device tag `tag`, without using that device.

    Parameters
    ----------
    tag : str
        A device, for example ``"cuda:0"``.

    Returns
    -------
    bytes
        The pickle that a process with this tensor on that device would send.
    """
    import torch

    buffer = io.BytesIO()
    storage = torch.tensor(VALUES).untyped_storage()
    typed = torch.storage.TypedStorage(  # type: ignore[no-untyped-call]
        wrap_storage=storage, dtype=torch.float32, _internal=True
    )
    torch.save(typed, buffer, _use_new_zipfile_serialization=False)
    on_cpu = buffer.getvalue()
    old_tag, new_tag = (b"X" + len(text).to_bytes(4, "little") + text.encode() for text in ("cpu", tag))
    if on_cpu.count(old_tag) != 1:
        raise DevGuardError(
            f"torch {torch.__version__} writes storages in a format that this check does not know. Please report this."
        )
    return pickle.dumps(_TaggedTensor(_TaggedStorage(on_cpu.replace(old_tag, new_tag))))


def examine() -> dict[str, Any]:
    """Return facts about torch and the devices, and whether the guard is effective here."""
    import torch

    found: dict[str, Any] = {
        "torch": torch.__version__,
        "torch_file": torch.__file__,
        "cuda": torch.version.cuda or torch.version.hip,
        "driver": _describe_driver(),
        "visible": accelerator.device_count(),
        "contexts": [str(device) for device in devguard.contexts()],  # read before the check opens one
        "open_at_import": sorted(name for name, row in devguard.status()["doors"].items() if row["open"]),
    }
    try:
        owner, looked = owner_from_environment()
        found["owner"] = {"device": None if owner is None else owner.tag, "looked_at": looked, "error": None}
    except DevGuardError as error:
        found["owner"] = {"device": None, "looked_at": [], "error": str(error)}
    found["check"], found["doors"] = _check_guard(found["visible"])
    # The names come last, because reading them initialises CUDA.
    found["names"] = [accelerator.name_of(index) for index in range(found["visible"])]
    return found


def _describe_driver() -> str | None:
    """Return the newest CUDA that the driver supports, or None without a driver. This does not initialise CUDA."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return f"supports CUDA up to {version.value // 1000}.{version.value % 1000 // 10}"


def _check_guard(visible: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Unpickle a storage with a foreign tag under a guard; return the outcome, and the state of the doors."""
    owner, tag = ("cpu", "cuda:1") if visible == 0 else ("cuda:0", "cuda:1") if visible == 1 else ("cuda:1", "cuda:0")
    result: dict[str, Any] = {
        "owner": owner,
        "tag": tag,
        "landed": None,
        "contexts": [],
        "recorded": False,
        "values": None,
    }
    doors: dict[str, Any] = {}
    try:
        message = tagged_pickle(tag)
        with devguard.guard(owner):
            doors = devguard.status()["doors"]
            tensor = pickle.loads(message)
            result["landed"] = str(tensor.device)
            result["recorded"] = any(stray.source == tag and stray.action == "repaired" for stray in devguard.strays())
            result["contexts"] = [str(device) for device in devguard.contexts()]
            result["values"] = tensor.tolist() == VALUES
        result["error"] = None
    except Exception as error:  # noqa: BLE001 - the doctor reports any failure of the guard
        result["error"] = "".join(traceback.format_exception_only(type(error), error)).strip()
    expected = [] if owner == "cpu" else [owner]
    result["effective"] = (
        result["error"] is None
        and result["landed"] == owner
        and result["recorded"]
        and result["values"]
        and result["contexts"] == expected
    )
    return result, doors


if __name__ == "__main__":
    json.dump(examine(), sys.stdout)
    sys.stdout.write("\n")
