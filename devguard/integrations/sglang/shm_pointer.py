"""SGLang's ``ShmPointerMMData`` with an arena of devguard.transport as its backing.

SGLang puts each tensor of an image into a segment of shared memory and sends an object with the segment's name. Here
the name holds the handle of a lease, and the tensor lies in the tokenizer's arena, or in the handle itself if it is
small. A process that passes the object on, as rank 0 and the data-parallel controller do, opens nothing. `materialize`
returns a private view; this rank's part of the lease is over when the view is collected. ``__del__`` and
``__getstate__`` stay as they are: an object with such a name has no segment to close.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import json
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

from devguard.errors import DevGuardError
from devguard.support.patching import Patches

if TYPE_CHECKING:
    from devguard.transport import Handle

__all__ = ["decode", "encode", "find_problem", "MODULE", "NAME", "patch", "PREFIX"]

MODULE = "sglang.srt.managers.mm_utils"
NAME = "ShmPointerMMData"
PREFIX = "devguard-transport:"  # of a name that holds a handle

_METHODS = ("__init__", "__getstate__", "__setstate__", "materialize", "close_and_unlink")


def find_problem(module: ModuleType) -> str:
    """Return why the class of this release cannot be patched; empty if it can."""
    found = getattr(module, NAME, None)
    if not isinstance(found, type):
        return f"it has no {NAME}"
    missing = [name for name in _METHODS if name not in vars(found)]
    return f"its {NAME} has no {', '.join(missing)}" if missing else ""


def encode(handle: Handle) -> str:
    """Return a name that holds a handle. The lease no longer ends with the object `handle`, as after pickling."""
    *fields, data, site = handle.__reduce__()[1]
    text = None if data is None else base64.b64encode(data).decode()
    return PREFIX + json.dumps([*fields, text, site])


def decode(name: str) -> Handle:
    """Return the handle that a name holds. Unpickles nothing."""
    from devguard.transport import Handle

    *fields, text, site = json.loads(name.removeprefix(PREFIX))
    address, number, readers, slot, segment, offset, nbytes = fields
    data = None if text is None else base64.b64decode(text)
    return Handle(address, number, readers, slot, segment, offset, nbytes, data, site)


def patch(
    patches: Patches, module: ModuleType, put: Callable[[Any], Handle | None], opened: Callable[[], None]
) -> None:
    """Patch the class.

    Parameters
    ----------
    patches : Patches
        Where the originals are kept.
    module : module
        SGLang's `MODULE`.
    put : callable
        ``put(tensor)`` puts a tensor into an arena, contiguous and on the host; None: SGLang is to use its segment.
    opened : callable
        Called before a lease is opened in this process.
    """
    kind: Any = getattr(module, NAME)
    make, restore, materialize, close = (
        vars(kind)[name] for name in ("__init__", "__setstate__", "materialize", "close_and_unlink")
    )

    @functools.wraps(make)
    def init(self: Any, tensor: Any, precomputed_hash: int | None = None) -> None:
        handle = put(tensor)
        if handle is None:
            make(self, tensor, precomputed_hash)
        else:
            _set(self, encode(handle), tensor.shape, tensor.dtype, precomputed_hash)

    @functools.wraps(restore)
    def set_state(self: Any, state: dict[str, Any]) -> None:
        if _is_ours(state["shm_name"]):
            _set(self, state["shm_name"], state["shape"], state["dtype"], state.get("precomputed_hash"))
        else:
            restore(self, state)

    @functools.wraps(materialize)
    def view(self: Any) -> Any:
        if not _is_ours(self.shm_name):
            return materialize(self)
        from devguard.transport.reading import keep

        opened()
        tensor = keep(decode(self.shm_name))
        self.is_over = True
        if tensor.shape != self.shape or tensor.dtype != self.dtype:
            raise RuntimeError(f"expected {self.dtype} {tuple(self.shape)}, got {tensor.dtype} {tuple(tensor.shape)}")
        return tensor

    @functools.wraps(close)
    def skip(self: Any) -> None:
        if not _is_ours(self.shm_name):
            close(self)
        elif not self.is_over:
            self.is_over = True
            with contextlib.suppress(DevGuardError):  # the lease has ended, or its process
                decode(self.shm_name).skip()

    for name, ours in (("__init__", init), ("__setstate__", set_state), ("materialize", view)):
        patches.replace(kind, name, ours)
    patches.replace(kind, "close_and_unlink", skip)


def _set(pointer: Any, name: str, shape: Any, dtype: Any, precomputed_hash: int | None) -> None:
    pointer.shm_name, pointer.shape, pointer.dtype, pointer.precomputed_hash = name, shape, dtype, precomputed_hash
    pointer._shm_handle = pointer.tensor = pointer._materialization_error = None
    pointer.is_over = False  # whether this process's part of the lease has begun or ended


def _is_ours(name: str) -> bool:
    return name.startswith(PREFIX)
