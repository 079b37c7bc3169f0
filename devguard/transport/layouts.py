"""The tensors of a payload: how each lies in the bytes that travel, and tensors of bytes over memory.

The only module of transport that knows torch's tensors when they are put. It is called for objects that hold one.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

__all__ = ["address_of", "as_tensor", "bytes_of", "is_plain", "Layout", "Part", "SMALL", "Tensors"]

# Bytes up to which one thread copies. Torch's calls take longer to begin, and its threads much longer to end where
# other programs use the cores.
SMALL = 4 << 20


class Part(NamedTuple):
    """A range of the payload's bytes, and how to write it."""

    nbytes: int
    write: Callable[[Any], None]


class Layout(NamedTuple):
    """How a tensor lies in its part; sizes in elements."""

    part: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    requires_grad: bool
    is_parameter: bool
    on_accelerator: bool


def is_plain(tensor: Any) -> bool:
    """Return whether a tensor is described by its layout: strided, of a whole number of bytes, without attributes."""
    torch = sys.modules["torch"]
    return (
        tensor.layout is torch.strided
        and tensor.device.type in ("cpu", "cuda")
        and not tensor.is_quantized
        and not tensor.is_nested
        and not any(getattr(tensor, "names", ()))  # which pickle refuses
        and tensor.dtype in _dtypes().values()
        and not torch._utils._get_obj_state(tensor)
        and not tensor._backward_hooks
    )


def _dtypes() -> dict[str, Any]:
    """Return the dtypes that can be views of bytes, by name."""
    if not _known_dtypes:
        torch = sys.modules["torch"]
        for name, dtype in vars(torch).items():
            if isinstance(dtype, torch.dtype) and str(dtype) == f"torch.{name}" and _is_view_of_bytes(dtype):
                _known_dtypes[name] = dtype
    return _known_dtypes


_known_dtypes: dict[str, Any] = {}


def _is_view_of_bytes(dtype: Any) -> bool:
    torch = sys.modules["torch"]
    try:
        return bool(torch.zeros(16, dtype=torch.uint8, device="cpu").view(dtype).view(torch.uint8).numel() == 16)
    except (RuntimeError, TypeError):  # quantized dtypes, and those of parts of a byte
        return False


def bytes_of(storage: Any) -> Any:
    torch = sys.modules["torch"]
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


class Tensors:
    """The tensors of a payload, grouped by the memory that they share.

    Attributes
    ----------
    accelerators : dict of torch.device
        The devices of the tensors that are not on the host, in their order.
    """

    def __init__(self) -> None:
        self._tensors: list[Any] = []
        self.accelerators: dict[Any, None] = {}

    def add(self, tensor: Any) -> int:
        """Add a tensor; return its number."""
        self._tensors.append(tensor)
        if tensor.device.type != "cpu":
            self.accelerators[tensor.device] = None
        return len(self._tensors) - 1

    def lay_out(self, parts: list[Part]) -> list[Layout]:
        """Add the parts of the tensors, and return where each lies.

        Tensors of one storage share a part that spans them, unless most of it would be bytes of none of them.
        """
        groups: dict[Any, list[int]] = {}
        for number, tensor in enumerate(self._tensors):
            memory = (str(tensor.device), tensor.untyped_storage().data_ptr()) if tensor.numel() else ("", number)
            groups.setdefault(memory, []).append(number)
        layouts: dict[int, Layout] = {}
        for numbers in groups.values():
            spans = [_span(self._tensors[number]) for number in numbers]
            start, end = min(start for start, _ in spans), max(end for _, end in spans)
            used = sum(self._tensors[number].nbytes for number in numbers)
            start -= start % 16  # so that a view of each dtype begins at a whole element
            if end - start <= 2 * used + 16 and not any(_is_lazy(self._tensors[number]) for number in numbers):
                part = self._add_span(parts, self._tensors[numbers[0]], start, end)
                for number in numbers:
                    layouts[number] = _layout(self._tensors[number], part, start)
            else:
                for number in numbers:
                    tensor = _resolved(self._tensors[number])
                    parts.append(Part(tensor.nbytes, _copier(tensor)))
                    layouts[number] = _layout(tensor, len(parts) - 1, None)
        return [layouts[number] for number in range(len(self._tensors))]

    @staticmethod
    def _add_span(parts: list[Part], tensor: Any, start: int, end: int) -> int:
        storage = tensor.untyped_storage()
        write: Callable[[Any], None]
        if 0 < end - start < SMALL and tensor.device.type == "cpu":
            write = partial(_copy_part, storage, start)
        else:
            write = _copier(bytes_of(storage)[start:end])
        parts.append(Part(end - start, write))
        return len(parts) - 1


def _is_lazy(tensor: Any) -> bool:
    """Return whether the values differ from the bytes: conjugate and negative views."""
    return bool(tensor.is_conj() or tensor.is_neg())


def _resolved(tensor: Any) -> Any:
    return tensor.detach().resolve_conj().resolve_neg()


def _span(tensor: Any) -> tuple[int, int]:
    """Return the first byte of a tensor in its storage, and the one after its last."""
    size = tensor.element_size()
    start = tensor.storage_offset() * size
    if not tensor.numel():
        return start, start
    last = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * size


def _layout(tensor: Any, part: int, start: int | None) -> Layout:
    """Describe a tensor; its part begins at byte `start` of its storage, or (None) is the tensor itself, contiguous."""
    torch = sys.modules["torch"]
    if start is None:
        strides, offset = torch.empty(tensor.shape, device="meta").stride(), 0
    else:
        strides, offset = tensor.stride(), tensor.storage_offset() - start // tensor.element_size()
    return Layout(
        part,
        str(tensor.dtype).removeprefix("torch."),
        tuple(tensor.shape),
        tuple(strides),
        offset,
        tensor.requires_grad,
        type(tensor) is torch.nn.Parameter,
        tensor.device.type != "cpu",
    )


def _copy_part(storage: Any, start: int, target: memoryview) -> None:
    ctypes.memmove(address_of(target), storage.data_ptr() + start, len(target))  # without the GIL


def address_of(buffer: memoryview) -> int:
    """Return the address of writable bytes, at least one."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def _copier(tensor: Any) -> Callable[[Any], None]:
    def write(target: Any) -> None:
        if tensor.numel():
            torch = sys.modules["torch"]
            host = as_tensor(target).view(tensor.dtype).view(tensor.shape)
            with torch.no_grad():
                host.copy_(tensor)

    return write


def as_tensor(buffer: Any) -> Any:
    """Return a tensor of bytes over a writable buffer, on the host. Not ``frombuffer``, which ``remap()`` replaces."""
    torch = sys.modules["torch"]
    return torch.asarray(buffer, dtype=torch.uint8, device="cpu", copy=False)
