"""Tensor parallel: one put, four readers. The bytes lie in host memory once; each rank copies them to its own GPU.

python examples/transport/tensor_parallel.py                             # no GPU needed
devguard sim --gpus 4 -- python examples/transport/tensor_parallel.py    # on simulated GPUs
"""

import multiprocessing
import time

import torch

import devguard
from devguard import transport

RANKS = 4


def rank(device, inbox, answers):
    """Read one request."""
    with devguard.guard(device):
        request = inbox.get().get()  # The queue's get returns the handle; the handle's get a copy on this rank's GPU.
        pixels = request["pixel_values"]
        answers.put(f"{list(pixels.shape)} on {pixels.device}, grid on {request['grid'].device}")


def main():
    """Put a request that lies on the sender's GPU, and send its handle to all ranks."""
    has_gpus = torch.cuda.device_count() >= RANKS
    devices = [f"cuda:{index}" if has_gpus else "cpu" for index in range(RANKS)]
    spawn = multiprocessing.get_context("spawn")
    with devguard.guard(devices[0]), transport.Arena("cpu", budget="64MiB") as arena:
        request = {"pixel_values": torch.ones(3996, 1176).to(devices[0]), "grid": torch.tensor([[1, 54, 74]])}
        handle = arena.put(request, to=RANKS)
        queues = [(spawn.SimpleQueue(), spawn.SimpleQueue()) for _ in devices]
        for device, (inbox, answers) in zip(devices, queues, strict=True):
            spawn.Process(target=rank, args=(device, inbox, answers)).start()
            inbox.put(handle)
        for index, (_, answers) in enumerate(queues):
            print(f"rank {index}: {answers.get()}")
        while arena.usage().leases:  # the last acknowledgement is on its way
            time.sleep(0.001)
        print(f"{arena.usage().in_use} bytes are under a lease, {arena.usage().peak >> 20} MiB were")


if __name__ == "__main__":
    main()
