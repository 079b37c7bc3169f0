"""Tensor parallel: one put, four readers. The bytes lie in host memory once; each rank copies them to its own GPU.

python examples/transport/tensor_parallel.py                             # no GPU needed
devguard sim --gpus 4 -- python examples/transport/tensor_parallel.py    # on simulated GPUs
"""

import torch

import devguard
from devguard import transport

RANKS = 4


def rank(index, handle):
    with devguard.guard(f"cuda:{index}" if torch.cuda.is_available() else "cpu"):
        request = handle.get()  # tensors that were on a GPU come to this rank's
        pixels = request["pixel_values"]
        print(f"rank {index}: {list(pixels.shape)} on {pixels.device}, grid on {request['grid'].device}")


if __name__ == "__main__":
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    with devguard.guard(device), transport.Arena("cpu", budget="64MiB") as arena:
        request = {"pixel_values": torch.ones(3996, 1176, device=device), "grid": torch.tensor([[1, 54, 74]])}
        handle = arena.put(request, to=RANKS)
        torch.multiprocessing.spawn(rank, args=(handle,), nprocs=RANKS)
        print(f"{arena.usage().peak >> 20} MiB were under a lease")
