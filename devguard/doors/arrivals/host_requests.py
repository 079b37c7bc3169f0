"""Requests for the host by name, such as ``tensor.cpu()``, for tensors that a ``cpu`` owner received from a GPU.

torch returns a tensor that is on the host already as it is. On the sender's GPU the request would have made a copy on
the host, and a pickle of this copy is a pickle of a CPU tensor. So a received tensor gives a copy too, which carries no
tag, and stays what it was itself. The methods are replaced when the first tensor is received, until the doors close.

Not seen: ``torch.as_tensor`` and ``torch.asarray``, which ``torch.compile`` knows by identity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from devguard.support.patching import Patches

__all__ = ["patch"]

_METHODS = ("cpu", "to", "type", "type_as")
_STORAGE_METHODS = ("cpu", "to")
# By which a tensor without a storage of its own returns its parts.
_PARTS = ("_indices", "_values", "values", "crow_indices", "col_indices", "ccol_indices", "row_indices")

IsReceived = Callable[[Any], bool]


def patch(patches: Patches, is_received: IsReceived) -> None:
    """Replace the methods of tensors and storages that return what is on the host as it is.

    Parameters
    ----------
    patches : Patches
        The patches of the open door.
    is_received : callable
        Returns whether an ``UntypedStorage`` carries a tag.
    """
    import torch

    def is_tagged(value: Any) -> bool:
        try:
            return any(is_received(storage) for storage in _storages_of(value))
        except (AttributeError, NotImplementedError, RuntimeError, TypeError):
            return False  # a tensor of a kind that has no storage

    def names_host(values: tuple[Any, ...]) -> bool:
        kinds = (str, torch.device, type(torch.FloatTensor))
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        # Without arguments: `cpu` of a packed sequence calls `to` so.
        return not values or any(isinstance(value, kinds) for value in values) or not all(map(is_tagged, tensors))

    for name in _METHODS:
        _patch_method(patches, torch.Tensor, name, names_host, is_tagged)
    for name in _STORAGE_METHODS:
        _patch_method(patches, torch.UntypedStorage, name, names_host, is_tagged)


def _patch_method(
    patches: Patches, kind: Any, name: str, names_host: Callable[[tuple[Any, ...]], bool], is_tagged: IsReceived
) -> None:
    original = patches.find(kind, name, inherited=True)

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        if result is self and (name == "cpu" or names_host((*args, *kwargs.values()))) and is_tagged(self):
            return _copy(self, is_tagged)
        return result

    patches.replace(kind, name, method, inherited=True)


def _copy(value: Any, is_tagged: IsReceived) -> Any:
    """Return a copy, of all parts: a clone of a jagged tensor shares its offsets."""
    copied = value.clone()
    if not is_tagged(copied):
        return copied
    names, context = copied.__tensor_flatten__()
    parts = {name: _copy(getattr(copied, name), is_tagged) for name in names}
    return type(copied).__tensor_unflatten__(parts, context, copied.size(), copied.stride())


def _storages_of(value: Any) -> Iterator[Any]:
    """Yield each storage in host memory of a tensor or a storage."""
    import torch
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    if isinstance(value, torch.UntypedStorage):
        yield value
    elif is_traceable_wrapper_subclass(value):
        for name in value.__tensor_flatten__()[0]:
            yield from _storages_of(getattr(value, name))
    elif value.layout is torch.strided:
        yield value.untyped_storage()
    else:
        for name in _PARTS:
            try:
                part = getattr(value, name)()
            except RuntimeError:  # not in this layout
                continue
            yield part.untyped_storage()
