"""The part of ``devguard doctor`` that needs torch, in a process of its own: ``python -m devguard.cli.selfcheck``.

It prints one JSON object. It really sends a tagged storage through pickle under a guard, so it may open a
context on the device that it takes as owner; the doctor itself opens none, and this process ends at once.
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

__all__ = ["examine", "tagged_pickle"]

VALUES = [float(number) for number in range(8)]


class _TaggedStorage:
    """Pickles as torch pickles a storage, with the device tag of our choice."""

    def __init__(self, legacy: bytes) -> None:
        self.legacy = legacy

    def __reduce__(self) -> tuple[Any, tuple[bytes]]:
        import torch

        return torch.storage._load_from_bytes, (self.legacy,)


class _TaggedTensor:
    """Pickles as torch pickles a tensor."""

    def __init__(self, storage: _TaggedStorage) -> None:
        self.storage = storage

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        import torch

        shape, stride = (len(VALUES),), (1,)
        return torch._utils._rebuild_tensor_v2, (self.storage, 0, shape, stride, False, OrderedDict())


def tagged_pickle(tag: str) -> bytes:
    """Return the pickle of a tensor of eight float32 whose tag says `tag`, made without touching that device.

    Parameters
    ----------
    tag : str
        Such as ``"cuda:0"``.

    Returns
    -------
    bytes
        What a process that holds the tensor on that device would pickle.
    """
    import torch

    buffer = io.BytesIO()
    storage = torch.tensor(VALUES).untyped_storage()
    typed = torch.storage.TypedStorage(  # type: ignore[no-untyped-call]
        wrap_storage=storage, dtype=torch.float32, _internal=True
    )
    torch.save(typed, buffer, _use_new_zipfile_serialization=False)
    found = buffer.getvalue()
    cpu, other = (b"X" + len(text).to_bytes(4, "little") + text.encode() for text in ("cpu", tag))
    if found.count(cpu) != 1:
        raise DevGuardError(
            f"torch {torch.__version__} writes storages in a way that this check does not know. Please report it."
        )
    return pickle.dumps(_TaggedTensor(_TaggedStorage(found.replace(cpu, other))))


def examine() -> dict[str, Any]:
    """Return what torch says of itself and of the devices, and whether the doors are effective here."""
    import torch

    found: dict[str, Any] = {
        "torch": torch.__version__,
        "torch_file": torch.__file__,
        "cuda": torch.version.cuda or torch.version.hip,
        "driver": _driver(),
        "visible": torch.cuda.device_count(),
        "contexts": [str(device) for device in devguard.contexts()],  # before anything of ours has run
        "open_at_import": sorted(name for name, row in devguard.status()["doors"].items() if row["open"]),
    }
    try:
        owner, looked = owner_from_environment()
        found["owner"] = {"device": None if owner is None else owner.tag, "looked_at": looked, "error": None}
    except DevGuardError as error:
        found["owner"] = {"device": None, "looked_at": [], "error": str(error)}
    found["check"], found["doors"] = _check(torch, found["visible"])
    found["names"] = [torch.cuda.get_device_name(index) for index in range(found["visible"])]  # last: it starts CUDA
    return found


def _driver() -> str | None:
    """Return the newest CUDA that the driver serves, None where there is no driver; asking starts nothing."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return f"serves CUDA up to {version.value // 1000}.{version.value % 1000 // 10}"


def _check(torch: Any, visible: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Send a storage with a foreign tag through pickle under a guard; return what became of it, and the doors."""
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
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what the doctor is asked for
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
