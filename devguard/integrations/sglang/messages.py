"""SGLang's second road for messages: msgpack, with ``SGLANG_USE_PICKLE_IPC=0``.

A tensor travels as bytes with the sender's device, and ``_restore_torch_tensor`` moves it there: the same bug as with
pickle, by another road that no door of torch sees. A controller that owns ``cpu`` keeps such a tensor on the host and
passes its tag on, as with pickle. The wire format stays as it is.
"""

from __future__ import annotations

import functools
import inspect
import sys
from types import ModuleType
from typing import Any

from devguard.doors.arrivals import relayed_tags
from devguard.ownership import in_force
from devguard.reporting.verdict import judge
from devguard.support.patching import Patches

__all__ = ["MODULE", "patch"]

MODULE = "sglang.srt.utils.msgpack_utils"
DOOR = "load"  # its mode counts: to the reader of a report it is the same door
_ADVICE = "The message carries the sender's device. Send CPU tensors, or let devguard repair it (mode='repair')."


def patch(patches: Patches, module: ModuleType) -> None:
    """Replace the functions that restore a tensor from a message and put one into it, where this release has them."""
    if any(row[0] is module for row in patches.replaced):
        return
    if hasattr(module, "_restore_torch_tensor"):
        _patch_restore(patches, module)
    if hasattr(module, "_pack_buffer_ext"):
        _patch_pack(patches, module)


def _patch_restore(patches: Patches, module: ModuleType) -> None:
    original = module._restore_torch_tensor
    signature = inspect.signature(original)
    if not {"data", "device"} <= set(signature.parameters):
        return

    @functools.wraps(original)
    def restore(*args: Any, **kwargs: Any) -> Any:
        owner = in_force.owner_at_door()
        call = signature.bind(*args, **kwargs)
        device = call.arguments.get("device", "cpu")
        if owner is None or not device.startswith("cuda") or device == owner.tag:
            return original(*args, **kwargs)
        if not judge(DOOR, device, owner, len(call.arguments["data"]), _ADVICE, target=owner.tag):
            return original(*args, **kwargs)
        call.arguments["device"] = owner.tag
        tensor = original(*call.args, **call.kwargs)
        if owner.index < 0:
            relayed_tags.keep(tensor.untyped_storage(), device)
        return tensor

    patches.replace(module, "_restore_torch_tensor", restore)


def _patch_pack(patches: Patches, module: ModuleType) -> None:
    """Write the tag that a relayed tensor came with.

    The function is given shape, dtype and device, not the tensor, which its caller has as ``obj``. The caller itself is
    held by encoders that may be older than this patch.
    """
    original = module._pack_buffer_ext

    @functools.wraps(original)
    def pack(code: int, metadata: Any, *rest: Any, **kwargs: Any) -> Any:
        if relayed_tags.status()["kept"] and isinstance(metadata, tuple) and metadata[-1:] == ("cpu",):
            tensor = sys._getframe(1).f_locals.get("obj")
            if isinstance(tensor, sys.modules["torch"].Tensor):
                tag = relayed_tags.tag_of(tensor.untyped_storage())
                if tag is not None:
                    metadata = (*metadata[:-1], tag)
                    relayed_tags.count()
        return original(code, metadata, *rest, **kwargs)

    patches.replace(module, "_pack_buffer_ext", pack)
