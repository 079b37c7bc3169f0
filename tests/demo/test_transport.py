"""Sending to one rank, and the answers. test_scenario.py tests the broadcast, which needs a process group."""

from __future__ import annotations

import multiprocessing

import torch

from devguard import transport
from devguard.demo.transport import ImageRequest, open_request, receive_request, send_request
from devguard.demo.worker import answer


def request() -> ImageRequest:
    return ImageRequest(torch.arange(2352, dtype=torch.float32).reshape(2, 1176), torch.tensor([[1, 1, 2]]))


def test_a_request_arrives_as_it_was_sent():
    sender, receiver = multiprocessing.Pipe()
    sent = request()
    send_request(sender, sent)
    received = receive_request(receiver)
    assert torch.equal(received.pixel_values, sent.pixel_values)
    assert torch.equal(received.image_grid_thw, sent.image_grid_thw)


def test_a_handle_travels_in_place_of_a_request_and_is_opened_at_the_end():
    sender, receiver = multiprocessing.Pipe()
    sent = request()
    with transport.Arena(budget="1MiB") as arena:
        send_request(sender, arena.put(sent))
        received = open_request(receive_request(receiver))
    assert torch.equal(received.pixel_values, sent.pixel_values)
    assert open_request(sent) is sent


def test_different_requests_have_different_digests():
    first, other_value, other_shape = request(), request(), request()
    other_value.pixel_values[1, 7] += 1
    other_shape.image_grid_thw = torch.tensor([[1, 2, 1]])
    digests = {answer(each)["digest"] for each in (first, other_value, other_shape)}
    assert len(digests) == 3
    assert answer(first) == answer(request())
    assert answer(first)["mean"] == 1175.5
    assert answer(first)["grid"] == [[1, 1, 2]]
    assert answer(first)["patches"] == 2
    assert answer(first)["device"] == "cpu"


def test_a_strided_tensor_and_its_contiguous_copy_have_the_same_digest():
    plain = request()
    strided = ImageRequest(plain.pixel_values.t().contiguous().t(), plain.image_grid_thw)
    assert answer(strided)["digest"] == answer(plain)["digest"]
