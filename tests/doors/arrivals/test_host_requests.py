"""What a ``cpu`` owner received and the program then moves to the host by name is a CPU tensor from there on."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import cloudpickle
import pytest
import torch

import devguard
from tests.helpers.relays import TAG, module_with, received, sent_to, typed

pytestmark = pytest.mark.usefixtures("clean")

# Requests for the host by name. A sender's GPU would return a copy there, so these return one.
ASK: dict[str, Callable[[torch.Tensor], Any]] = {
    "cpu": lambda tensor: tensor.cpu(),
    "cpu with a memory format": lambda tensor: tensor.cpu(memory_format=torch.preserve_format),
    "cpu of the class": lambda tensor: torch.Tensor.cpu(tensor),
    "cpu of a view": lambda tensor: tensor[2:4].cpu(),
    "a view of cpu": lambda tensor: tensor.cpu()[2:4],
    "cpu of a parameter": lambda tensor: torch.nn.Parameter(tensor).cpu(),
    "cpu of a detached tensor": lambda tensor: tensor.detach().cpu(),
    "cpu twice": lambda tensor: tensor.cpu().cpu(),
    "to": lambda tensor: tensor.to("cpu"),
    "to a device": lambda tensor: tensor.to(torch.device("cpu")),
    "to device=": lambda tensor: tensor.to(device="cpu"),
    "to a device and type": lambda tensor: tensor.to("cpu", torch.float32),
    "to a type and device=": lambda tensor: tensor.to(dtype=torch.float32, device=torch.device("cpu")),
    "to with non_blocking": lambda tensor: tensor.to("cpu", non_blocking=True),
    "to a copy": lambda tensor: tensor.to("cpu", copy=True),
    "to another tensor": lambda tensor: tensor.to(torch.zeros(1)),
    "to tensor=": lambda tensor: tensor.to(tensor=torch.zeros(1)),
    "type": lambda tensor: tensor.type("torch.FloatTensor"),
    "type, a class": lambda tensor: tensor.type(torch.FloatTensor),
    "type_as": lambda tensor: tensor.type_as(torch.zeros(1)),
    "a storage": lambda tensor: torch.empty(0).set_(tensor.untyped_storage().cpu()),
    "a storage's to": lambda tensor: torch.empty(0).set_(tensor.untyped_storage().to(device="cpu")),
    "a typed storage": lambda tensor: typed(tensor).cpu(),
    "a module": lambda tensor: module_with(tensor).cpu(),
    "a module's to": lambda tensor: module_with(tensor).to("cpu"),
    "a container": lambda tensor: {"a": [part.cpu() for part in tensor.split(2)]},
    "map": lambda tensor: list(map(torch.Tensor.cpu, [tensor])),
    "a packed sequence": lambda tensor: torch.nn.utils.rnn.PackedSequence(tensor, torch.ones(6).long()).cpu(),
}


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("how", ASK)
def test_a_value_that_the_program_moves_to_the_host_by_name_is_on_the_host(how: str) -> None:
    with devguard.guard("cpu"):
        tensor = received()
        value = ASK[how](tensor)
        assert sent_to(pickle.dumps(value)) == []
        assert sent_to(cloudpickle.dumps(value)) == []
        assert sent_to(pickle.dumps(tensor)) == [TAG]


def test_what_is_moved_to_the_host_is_a_copy_as_from_a_gpu() -> None:
    with devguard.guard("cpu"):
        tensor = received(torch.arange(6.0).reshape(2, 3).t())
        moved = tensor.cpu()
    assert moved is not tensor
    assert (moved.tolist(), moved.stride(), moved.dtype) == (tensor.tolist(), tensor.stride(), tensor.dtype)
    moved.zero_()
    assert tensor.tolist() == [[0, 3], [1, 4], [2, 5]]
    leaf = received().requires_grad_()
    leaf.cpu().sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.tolist() == [1] * 6


@pytest.mark.parametrize("name", ["cpu", "to", "type", "type_as"])
def test_a_tensor_that_was_not_received_is_returned_as_it_is(name: str) -> None:
    received()
    arguments = {"cpu": (), "to": ("cpu",), "type": ("torch.FloatTensor",), "type_as": (torch.zeros(1),)}[name]
    for tensor in (torch.ones(2), torch.nn.Parameter(torch.ones(2)), torch.ones(2).to_sparse()):
        if tensor.layout is torch.strided or name in ("cpu", "to"):
            assert getattr(tensor, name)(*arguments) is tensor
    with pytest.raises((TypeError, RuntimeError)):
        getattr(torch.ones(2), name)(object())


SPECIAL: dict[str, Callable[[], Any]] = {
    "sparse": lambda: torch.eye(2).to_sparse(),
    "csr": lambda: torch.eye(2).to_sparse_csr(),
    "a subclass": lambda: _two(),
    "jagged": lambda: torch.nested.nested_tensor([torch.arange(2.0), torch.arange(3.0)], layout=torch.jagged),
}


def _two() -> Any:
    from torch.testing._internal.two_tensor import TwoTensor

    return TwoTensor(torch.ones(2), torch.zeros(2))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", SPECIAL)
def test_special_tensors_are_relayed_and_moved_whole(name: str) -> None:
    with devguard.guard("cpu"):
        tensor = received(SPECIAL[name]())
        assert set(sent_to(pickle.dumps(tensor))) == {TAG}
        for moved in (tensor.cpu(), tensor.to("cpu")):
            assert sent_to(pickle.dumps(moved)) == []
        assert set(sent_to(pickle.dumps(tensor))) == {TAG}


def test_closing_the_doors_restores_the_methods_of_tensors() -> None:
    def held() -> list[Any]:
        kinds = (torch.Tensor, torch.UntypedStorage, torch.storage._StorageBase)
        return [dict(vars(kind)) for kind in kinds] + [torch.serialization.location_tag]

    before = held()
    received()
    assert held() != before
    assert devguard.uninstall() == []
    assert held() == before


def test_compiled_code_may_move_a_tensor_to_the_host() -> None:
    def work(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.cpu().to("cpu") + torch.as_tensor(tensor, device="cpu").type_as(tensor)

    received()
    assert torch.compile(work, backend="eager")(torch.ones(2)).tolist() == [2, 2]
