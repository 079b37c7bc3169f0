"""The two ways by which SGLang's ranks get a request that holds tensors; both are plain pickle.

Neither names a device, and that is the disease: a pickled CUDA tensor carries its sender's ``cuda:0``, and
``pickle.loads`` obeys it. Both functions are written as the originals are, and know nothing of devguard.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch
import torch.distributed

__all__ = ["ImageRequest", "broadcast_request", "receive_request", "send_request"]


@dataclass
class ImageRequest:
    """What the tokenizer sends to the ranks for one request with pictures.

    Attributes
    ----------
    pixel_values : Tensor, float32, shape [patches, 1176]
        See `devguard.demo.patches.batch`.
    image_grid_thw : Tensor, int64, shape [images, 3]
        Patches in time, down and across.
    """

    pixel_values: torch.Tensor
    image_grid_thw: torch.Tensor


def send_request(link: Connection, request: ImageRequest) -> None:
    """Send a request to one rank (zmq's ``send_pyobj``, over a pipe)."""
    link.send_bytes(pickle.dumps(request, protocol=pickle.HIGHEST_PROTOCOL))


def receive_request(link: Connection) -> ImageRequest:
    """Receive a request that was sent to this rank alone (zmq's ``recv_pyobj``, over a pipe)."""
    message = link.recv_bytes()
    request: ImageRequest = pickle.loads(message)
    return request


def broadcast_request(request: ImageRequest | None, rank: int) -> ImageRequest:
    """Hand the request of rank 0 to every rank (``broadcast_pyobj`` of SGLang, over torch.distributed and
    gloo).

    Parameters
    ----------
    request : ImageRequest or None
        The request on rank 0, None elsewhere.
    rank : int
        This process's rank in the default group.

    Returns
    -------
    ImageRequest
        On rank 0 the object itself, elsewhere a copy.
    """
    if rank == 0:
        message = bytearray(pickle.dumps(request))
        torch.distributed.broadcast(torch.tensor([len(message)], dtype=torch.int64), src=0)
        torch.distributed.broadcast(torch.frombuffer(message, dtype=torch.uint8), src=0)
        assert request is not None
        return request
    size = torch.zeros(1, dtype=torch.int64)
    torch.distributed.broadcast(size, src=0)
    message = bytearray(int(size.item()))
    torch.distributed.broadcast(torch.frombuffer(message, dtype=torch.uint8), src=0)
    received: ImageRequest = pickle.loads(message)
    return received
