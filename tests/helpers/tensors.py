"""Make tensors of every kind, move them, and describe them in a form that can be compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch.testing._internal.two_tensor import TwoTensor

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.complex64,
    torch.complex128,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.bool,
]
# torch 2.13 cannot read back a float8 tensor that was pickled plainly or saved in the legacy format (its storage has no
# typed class, which the legacy reader needs), nor one that requires a gradient (it sets the flag too early). This holds
# without devguard too.
ZIP_ONLY = [torch.float8_e4m3fn, torch.float8_e5m2]
ZIP_DTYPES = [*DTYPES, *ZIP_ONLY]


class Failing:
    """An object that cannot be unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _fail, ()


def _fail() -> None:
    raise ZeroDivisionError


@st.composite
def tensors(
    draw: st.DrawFn, sharing: list[torch.Tensor] | None = None, dtypes: list[torch.dtype] = DTYPES
) -> torch.Tensor:
    """A CPU tensor with any dtype, shape, strides and offset; perhaps a view of one of `sharing`."""
    if sharing and draw(st.booleans()):
        base = draw(st.sampled_from(sharing))
        flat = base.detach().as_strided((base.untyped_storage().nbytes() // base.element_size(),), (1,), 0)
        start = draw(st.integers(0, flat.numel()))
        return flat[start:]
    dtype = draw(st.sampled_from(dtypes))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    numel = 1
    for size in shape:
        numel *= size
    offset = draw(st.integers(0, 3))
    data = (torch.arange(numel + offset, dtype=torch.float32) - 2).to(dtype)
    tensor = data[offset:].reshape(shape)
    if tensor.dim() >= 2 and draw(st.booleans()):
        tensor = tensor.transpose(0, 1)
    if tensor.dim() >= 1 and tensor.shape[0] and draw(st.booleans()):
        tensor = tensor[:: draw(st.integers(1, 2))]
    differentiable = dtype.is_complex or (dtype.is_floating_point and dtype not in ZIP_ONLY)
    if differentiable and draw(st.booleans()):
        tensor = torch.nn.Parameter(tensor) if draw(st.booleans()) else tensor.requires_grad_()
    return tensor


@st.composite
def containers(draw: st.DrawFn, dtypes: list[torch.dtype] = DTYPES) -> Any:
    """Tensors, some of which share storage, inside nested lists and dictionaries."""
    made: list[torch.Tensor] = []
    for _ in range(draw(st.integers(1, 4))):
        made.append(draw(tensors(made, dtypes)))
    leaves = st.sampled_from(made) | st.integers() | st.text(max_size=3)
    nest = st.recursive(
        leaves,
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3) | st.tuples(inner)
        ),
        max_leaves=6,
    )
    return [made, draw(nest)]


def to(value: Any, device: str) -> Any:
    """Return the same containers with their tensors on `device`; aliases, strides and offsets are kept."""
    storages: dict[int, torch.UntypedStorage] = {}
    moved: dict[int, torch.Tensor] = {}

    def move(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in moved:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in storages:
                storages[key] = storage.to(device=torch.device(device))
            data = torch.empty(0, dtype=tensor.dtype, device=device).set_(
                storages[key], tensor.storage_offset(), tensor.shape, tensor.stride()
            )
            if isinstance(tensor, torch.nn.Parameter):
                data = torch.nn.Parameter(data)
            elif tensor.requires_grad:
                data.requires_grad_()
            moved[id(tensor)] = data
        return moved[id(tensor)]

    def walk(node: Any) -> Any:
        if isinstance(node, torch.Tensor):
            return move(node)
        if isinstance(node, dict):
            return {key: walk(child) for key, child in node.items()}
        if isinstance(node, (list, tuple)):
            return type(node)(map(walk, node))
        return node

    return walk(value)


def describe(value: Any) -> str:
    """Return, as a string to compare, all that a load must keep of the tensors in `value`."""
    storages: dict[int, int] = {}

    def walk(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: walk(child) for key, child in node.items()}
        if isinstance(node, (list, tuple)):
            return [type(node).__name__, *map(walk, node)]
        return _tensor(node, storages) if isinstance(node, torch.Tensor) else node

    return repr(walk(value))


def _tensor(tensor: torch.Tensor, storages: dict[int, int]) -> Any:
    about: list[Any] = [type(tensor).__name__, str(tensor.dtype), str(tensor.device), tensor.requires_grad]
    about += [str(tensor.layout), tensor.is_quantized, tensor.is_nested]
    if isinstance(tensor, TwoTensor):
        return [*about, _tensor(tensor.a, storages), _tensor(tensor.b, storages)]
    if tensor.is_nested:
        return [*about, [_tensor(part, {}) for part in tensor.unbind()]]
    about.append(tuple(tensor.shape))
    if tensor.layout is torch.sparse_coo:
        return [*about, _tensor(tensor._indices(), storages), _tensor(tensor._values(), storages)]
    if tensor.layout is not torch.strided:
        compressed = tensor.layout in (torch.sparse_csr, torch.sparse_bsr)
        first = tensor.crow_indices() if compressed else tensor.ccol_indices()
        second = tensor.col_indices() if compressed else tensor.row_indices()
        return [*about, *(_tensor(part, storages) for part in (first, second, tensor.values()))]
    storage = tensor.untyped_storage()
    about += [
        tensor.stride(),
        tensor.storage_offset(),
        tensor.is_conj(),
        tensor.is_neg(),
        getattr(tensor, "names", None),
    ]
    if storage.nbytes():  # torch makes a new storage for each reference to an empty one
        about.append(storages.setdefault(storage._cdata, len(storages)))
    if tensor.is_quantized and tensor.qscheme() is torch.per_tensor_affine:
        about += [tensor.q_scale(), tensor.q_zero_point()]
    return [*about, bytes(storage.cpu().tolist())]


def devices(tensor: torch.Tensor) -> set[torch.device]:
    """Return the devices of a tensor and of its parts."""
    found = {tensor.device}
    for name in ("a", "b", "_values", "_indices", "_offsets"):
        part = getattr(tensor, name, None)
        part = part() if callable(part) and tensor.is_sparse else part
        if isinstance(part, torch.Tensor):
            found.add(part.device)
    return found


def _sparse(layout: torch.layout) -> Callable[[str], torch.Tensor]:
    def make(device: str) -> torch.Tensor:
        dense = torch.tensor([[0.0, 1.0, 0.0, 0.0], [2.0, 0.0, 0.0, 3.0]])
        options: dict[str, Any] = {"blocksize": (1, 2)} if layout in (torch.sparse_bsr, torch.sparse_bsc) else {}
        return dense.to_sparse(layout=layout, **options).to(device)

    return make


def _named(device: str) -> torch.Tensor:
    return torch.arange(6.0).reshape(2, 3).to(device).refine_names("rows", "columns")


# kinds of tensors other than strided ones: name -> function of a device
SPECIAL: dict[str, Callable[[str], torch.Tensor]] = {
    "conj": lambda device: torch.tensor([1 + 2j, 3 - 1j]).to(device).conj(),
    "neg": lambda device: torch._neg_view(torch.arange(3.0).to(device)),
    "coo": lambda device: torch.sparse_coo_tensor([[0, 1], [2, 0]], [1.0, 2.0], (2, 3), is_coalesced=True).to(device),
    "csr": _sparse(torch.sparse_csr),
    "csc": _sparse(torch.sparse_csc),
    "bsr": _sparse(torch.sparse_bsr),
    "two_tensor": lambda device: TwoTensor(torch.arange(3.0).to(device), torch.arange(3.0, 6.0).to(device)),
    "parameter": lambda device: torch.nn.Parameter(torch.arange(3.0).to(device)),
    "buffer": lambda device: torch.nn.Buffer(torch.arange(3.0).to(device)),
    "empty": lambda device: torch.empty((0, 3)).to(device),
    "scalar": lambda device: torch.tensor(2.5).to(device),
    "nested": lambda device: torch.nested.nested_tensor([torch.arange(2.0), torch.arange(3.0)]).to(device),
}
