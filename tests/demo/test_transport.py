"""The point-to-point way; the broadcast needs a group and is tested by the whole demonstration."""

from __future__ import annotations

import multiprocessing

import torch

from devguard.demo.transport import ImageRequest, receive_request, send_request
from devguard.demo.worker import answer


def request() -> ImageRequest:
    return ImageRequest(torch.arange(2352, dtype=torch.float32).reshape(2, 1176), torch.tensor([[1, 1, 2]]))


def test_a_request_arrives_as_it_was_sent():
    ours, theirs = multiprocessing.Pipe()
    sent = request()
    send_request(ours, sent)
    received = receive_request(theirs)
    assert torch.equal(received.pixel_values, sent.pixel_values)
    assert torch.equal(received.image_grid_thw, sent.image_grid_thw)


def test_the_answer_tells_requests_apart():
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


def test_a_strided_tensor_is_the_same_answer_as_its_copy():
    plain = request()
    strided = ImageRequest(plain.pixel_values.t().contiguous().t(), plain.image_grid_thw)
    assert answer(strided)["digest"] == answer(plain)["digest"]
