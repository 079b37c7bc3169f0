"""Data parallel: the router picks a worker after the put, and passes the handle on, unopened and without torch.

python examples/transport/data_parallel.py                             # no GPU needed
devguard sim --gpus 2 -- python examples/transport/data_parallel.py    # on simulated GPUs
"""

import multiprocessing
import sys

import devguard
from devguard import transport

WORKERS = 2


def router(inbox, workers, answers):
    """Pass each handle to the next worker."""
    sizes = []
    for number, handle in enumerate(iter(inbox.get, None)):
        workers[number % WORKERS].put(handle)
        sizes.append(handle.nbytes >> 20)
    answers.put(f"router: passed on {sizes} MiB, torch imported: {'torch' in sys.modules}")


def worker(device, inbox, answers):
    """Read two requests, each of which has one reader."""
    with devguard.guard(device):
        found = [inbox.get().get() for _ in range(2)]
        answers.put(", ".join(f"{int(audio[0].cpu())} on {audio.device}" for audio in found))


def main():
    """Put four requests, and send their handles to the router."""
    spawn = multiprocessing.get_context("spawn")
    inbox, *inboxes = (spawn.SimpleQueue() for _ in range(1 + WORKERS))
    routed, *answers = (spawn.SimpleQueue() for _ in range(1 + WORKERS))
    spawn.Process(target=router, args=(inbox, inboxes, routed)).start()
    import torch

    devices = [f"cuda:{index}" if torch.cuda.device_count() >= WORKERS else "cpu" for index in range(WORKERS)]
    with devguard.guard(devices[0]), transport.Arena("cpu", budget="16MiB") as arena:
        for number in range(4):
            inbox.put(arena.put(torch.full((1 << 18,), float(number)).to(devices[0])))
        inbox.put(None)
        print(routed.get())
        for index, device in enumerate(devices):
            spawn.Process(target=worker, args=(device, inboxes[index], answers[index])).start()
        for index in range(WORKERS):
            print(f"worker {index}: {answers[index].get()}")


if __name__ == "__main__":
    main()
