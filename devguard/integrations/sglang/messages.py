"""SGLang's second format of messages: msgpack, used with ``SGLANG_USE_PICKLE_IPC=0``.

A tensor travels as bytes with the sender's device, and ``_restore_torch_tensor`` moves it to that device. The bug is
the same as with pickle, but no door of torch sees it. A controller that owns ``cpu`` keeps such a tensor on the host
and passes its tag on, as with pickle. The wire format is unchanged.
"""

from __future__ import annotations

import functools
import inspect
import sys
from types import ModuleType
from typing import Any

from devguard.doors.arrivals import relayed_tags
from devguard.ownership import in_force
from devguard.ownership.owner import names_cuda
from devguard.reporting.verdict import judge
from devguard.support.patching import Patches

__all__ = ["MODULE", "patch"]

MODULE = "sglang.srt.utils.msgpack_utils"
DOOR = "load"  # To the reader of a report this is the same kind of stray, so the mode of this door applies.
_ADVICE = "The message carries the sender's device. Send CPU tensors, or let devguard repair it (mode='repair')."


def patch(patches: Patches, module: ModuleType) -> None:
    """Patch the functions that unpack a tensor from a message and pack one, if this release has them."""
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
        if owner is None or not names_cuda(device) or device == owner.tag:
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
    """Pack a relayed tensor with the tag that it arrived with.

    The function receives shape, dtype and device, but not the tensor, which is the local ``obj`` of its caller. The
    caller is not patched, because encoders older than this patch may hold it.
    """
    original = module._pack_buffer_ext

    @functools.wraps(original)
    def pack(code: int, metadata: Any, *rest: Any, **kwargs: Any) -> Any:
        if relayed_tags.status()["kept"] and isinstance(metadata, tuple) and metadata[-1:] == ("cpu",):
            tensor = sys._getframe(1).f_locals.get("obj")
            if isinstance(tensor, sys.modules["torch"].Tensor):
                tag = relayed_tags.tag_to_send(tensor.untyped_storage())
                if tag is not None:
                    metadata = (*metadata[:-1], tag)
                    relayed_tags.count()
        return original(code, metadata, *rest, **kwargs)

    patches.replace(module, "_pack_buffer_ext", pack)
