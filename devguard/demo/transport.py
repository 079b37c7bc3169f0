"""Send a request that holds tensors to the ranks in SGLang's two ways; both use plain pickle.

Neither way names a device, which causes the bug: a pickled CUDA tensor carries its sender's ``cuda:0``, and
``pickle.loads`` rebuilds the tensor there. Both are written like the originals and do not use devguard.

With ``--transport host`` the same two ways carry a handle in place of the request, and `open_request` reads it.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch
import torch.distributed

from devguard.transport import Handle

__all__ = ["broadcast_request", "ImageRequest", "open_request", "receive_request", "send_request"]


@dataclass
class ImageRequest:
    """One request with pictures, sent by the tokenizer to the ranks.

    Attributes
    ----------
    pixel_values : Tensor, float32, shape [patches, 1176]
        See `devguard.demo.image_patches.make_batch`.
    image_grid_thw : Tensor, int64, shape [images, 3]
        Patches in time, down and across.
    """

    pixel_values: torch.Tensor
    image_grid_thw: torch.Tensor


def send_request(link: Connection, request: ImageRequest | Handle) -> None:
    """Send a request to one rank (zmq's ``send_pyobj``, over a pipe)."""
    link.send_bytes(pickle.dumps(request, protocol=pickle.HIGHEST_PROTOCOL))


def receive_request(link: Connection) -> ImageRequest | Handle:
    """Receive a request sent to this rank only (zmq's ``recv_pyobj``, over a pipe)."""
    message = link.recv_bytes()
    request: ImageRequest | Handle = pickle.loads(message)
    return request


def broadcast_request(request: ImageRequest | Handle | None, rank: int) -> ImageRequest | Handle:
    """Broadcast the request of rank 0 to all ranks (SGLang's ``broadcast_pyobj``, over torch.distributed and gloo).

    Parameters
    ----------
    request : ImageRequest, Handle or None
        The request on rank 0, None elsewhere.
    rank : int
        This process's rank in the default group.

    Returns
    -------
    ImageRequest or Handle
        The object itself on rank 0, a copy elsewhere.
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
    received: ImageRequest | Handle = pickle.loads(message)
    return received


def open_request(received: ImageRequest | Handle) -> ImageRequest:
    """Return the request itself: what was received, or, for a handle, a copy on this process's own GPU."""
    if isinstance(received, Handle):
        request: ImageRequest = received.get()
        return request
    return received
