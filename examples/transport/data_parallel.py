"""Data parallel: the router picks a worker after the put, and passes the handle on, unopened and without torch.

python examples/transport/data_parallel.py                             # no GPU needed
devguard sim --gpus 2 -- python examples/transport/data_parallel.py    # on simulated GPUs
"""

import multiprocessing
import sys

import devguard
from devguard import transport


def router(requests, workers):
    for number, handle in enumerate(iter(requests.get, None)):
        workers[number % len(workers)].put(handle)
    print("router: torch imported:", "torch" in sys.modules)


def worker(index, device, requests):
    with devguard.guard(device):
        for audio in (requests.get().get() for _ in range(2)):
            print(f"worker {index}: request {int(audio[0])} on {audio.device}")


if __name__ == "__main__":
    spawn = multiprocessing.get_context("spawn")
    requests, *workers = (spawn.SimpleQueue() for _ in range(3))
    processes = [spawn.Process(target=router, args=(requests, workers))]
    import torch

    devices = ["cuda:0", "cuda:1"] if torch.cuda.is_available() else ["cpu", "cpu"]
    processes += [spawn.Process(target=worker, args=(i, devices[i], workers[i])) for i in range(2)]
    with devguard.guard(devices[0]), transport.Arena("cpu", budget="16MiB") as arena:
        for process in processes:
            process.start()
        for number in range(4):
            requests.put(arena.put(torch.full((1 << 18,), float(number), device=devices[0])))
        requests.put(None)
        for process in processes:
            process.join()
