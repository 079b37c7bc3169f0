"""A rank is killed while it reads: the other rank has its copy, the lease ends by the death, and nothing stays behind.

python examples/transport/killed_rank.py    # no GPU needed
"""

import multiprocessing
import os
import time

import torch

from devguard import transport

spawn = multiprocessing.get_context("spawn")


def rank(address, name, inbox, answers):
    """Read one request, and stay inside until the second message."""
    transport.join(address, name=name)
    with inbox.get().view() as request:
        answers.put(f"{name} reads")
        inbox.get()
        answers.put(f"{name} has read {int(request.sum())}")


def start(address, name):
    """Start a rank; return its process and its queues."""
    inbox, answers = spawn.SimpleQueue(), spawn.SimpleQueue()
    process = spawn.Process(target=rank, args=(address, name, inbox, answers))
    process.start()
    return process, inbox, answers


def main():
    """Kill rank 1, and send the request again to its successor. The sender's tensor is its own all the time."""
    with transport.Arena("cpu", budget="16MiB") as arena:
        request = torch.ones(1_000_000)
        ranks = [start(arena.address, name) for name in ("tp0", "tp1")]
        handle = arena.put(request, to=["tp0", "tp1"])
        for _, inbox, answers in ranks:
            inbox.put(handle)
            print(answers.get())
        ranks[0][1].put("finish")
        print(ranks[0][2].get())
        ranks[1][0].kill()
        while arena.usage().in_use:
            time.sleep(0.001)
        print("tp1 is killed, and its lease has ended")
        ranks[1] = start(arena.address, "tp1")
        for message in (arena.put(request, to=["tp1"]), "finish"):
            ranks[1][1].put(message)
            print(ranks[1][2].get())
    with open("/proc/self/maps") as maps:
        left = [line for line in maps if "devguard-transport" in line]
    left += [name for name in os.listdir("/dev/shm") if "devguard-transport" in name]
    print("left in this process and in /dev/shm:", left)


if __name__ == "__main__":
    main()
