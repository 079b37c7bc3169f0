"""A rank is killed while it reads: the other rank has its copy, the lease ends by the death, and nothing stays behind.

python examples/transport/killed_rank.py    # no GPU needed
"""

import os
import signal
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

import torch

from devguard import transport


def rank(address, name, handle, fails=False):
    with transport.join(address, name=name), handle.view() as request:
        if fails:
            os.kill(os.getpid(), signal.SIGKILL)
        return f"{name} has read {int(request.sum())}"


def start(*arguments):
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(rank, *arguments)


if __name__ == "__main__":
    request = torch.ones(1_000_000)  # the sender's own, all the time
    with transport.Arena("cpu", budget="6MiB") as arena:
        handle = arena.put(request, to=["tp0", "tp1"])
        print(start(arena.address, "tp0", handle).result())
        try:
            start(arena.address, "tp1", handle, True).result()
        except BrokenProcessPool:
            print("tp1 was killed")
        again = arena.put(request, to=["tp1"])  # there is room: the death has ended the first lease
        print("the new", start(arena.address, "tp1", again).result())
    print("left in /dev/shm:", [name for name in os.listdir("/dev/shm") if "devguard" in name])
