"""One rank: the process that owns ``cuda:<gpu_id>``, as SGLang's scheduler process does.

`serve` is the entry point of the unguarded pass. `serve_guarded` is the same program behind the decorator, the one
line that devguard needs.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import devguard

__all__ = ["serve", "serve_guarded"]

GLOO_LIMIT = timedelta(seconds=120)


def serve(link: Connection, gpu_id: int, ranks: int, meeting: str) -> None:
    """Serve requests until the tokenizer sends "stop" or exits.

    Parameters
    ----------
    link : Connection
        This rank's pipe to the tokenizer.
    gpu_id : int
        The GPU that this rank owns; also its rank.
    ranks : int
        The number of ranks.
    meeting : str
        The file through which the ranks find each other.
    """
    try:
        _serve(link, gpu_id, ranks, meeting)
    except EOFError:
        os._exit(1)  # The tokenizer has exited, so there is nothing left to do.
    except Exception:
        link.send(("failed", traceback.format_exc()))
        raise


@devguard.guard(argument="gpu_id")
def serve_guarded(link: Connection, gpu_id: int, ranks: int, meeting: str) -> None:
    """Serve requests as `serve` does, with everything kept on ``cuda:<gpu_id>``."""
    serve(link, gpu_id, ranks, meeting)


def _serve(link: Connection, gpu_id: int, ranks: int, meeting: str) -> None:
    import torch

    from devguard.demo.transport import ImageRequest, broadcast_request, open_request, receive_request

    torch.cuda.set_device(gpu_id)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=gpu_id, world_size=ranks, timeout=GLOO_LIMIT
    )
    link.send(("ready", os.getpid()))
    held: list[ImageRequest] = []  # Like a server, keep each request alive while it is in work.
    while True:
        command = link.recv()
        if command == "broadcast":
            received = broadcast_request(receive_request(link) if gpu_id == 0 else None, gpu_id)
            held.append(open_request(received))
            link.send(("received", None))
        elif command == "direct":
            held.append(open_request(receive_request(link)))
            link.send(("received", None))
        elif command == "answer":
            link.send(("answer", answer(held[-1])))
        elif command == "report":
            link.send(("report", report(gpu_id)))
        else:
            break
    torch.distributed.destroy_process_group()


def answer(request: Any) -> dict[str, Any]:
    """Process a request on the host, and return values that the tokenizer can check.

    Returns
    -------
    dict
        ``device`` (of `pixel_values`), ``digest`` (SHA-256 over both tensors, hexadecimal), ``mean`` (of
        `pixel_values`, no unit), ``grid`` (`image_grid_thw` as lists), ``patches`` (rows of `pixel_values`).
    """
    device = str(request.pixel_values.device)
    pixel_values, grid = request.pixel_values.cpu().contiguous(), request.image_grid_thw.cpu().contiguous()
    digest = hashlib.sha256()
    for tensor in (pixel_values, grid):
        digest.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(ctypes.string_at(tensor.data_ptr(), tensor.nbytes))  # Tensor.numpy would need numpy.
    return {
        "device": device,
        "digest": digest.hexdigest(),
        "mean": float(pixel_values.double().mean()),
        "grid": grid.tolist(),
        "patches": pixel_values.shape[0],
    }


def report(gpu_id: int) -> dict[str, Any]:
    """Return what this process holds on each GPU, as seen from inside, and its strays.

    Returns
    -------
    dict
        ``owner``; ``devices``: for the process's own GPU and each GPU with a context the ``index``, the ``context``,
        and the ``bytes`` and ``peak_bytes`` reserved by torch's allocator; ``strays``: the journal, with the ``code``
        of each stray's line.
    """
    import torch

    with_context = {device.index for device in devguard.contexts()}
    devices = []
    for index in sorted(with_context | {gpu_id}):
        devices.append(
            {
                "index": index,
                "context": index in with_context,
                "bytes": torch.cuda.memory_reserved(index),
                "peak_bytes": torch.cuda.max_memory_reserved(index),
            }
        )
    owner = devguard.owner()
    return {
        "owner": None if owner is None else str(owner),
        "devices": devices,
        "strays": [{**stray.as_dict(), "code": stray.site.source if stray.site else ""} for stray in devguard.strays()],
    }
