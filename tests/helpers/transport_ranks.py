"""One payload from a GPU to N ranks through an arena, on simulated GPUs: what it costs, as JSON on standard output.

The main process owns GPU 0, as a tokenizer with a fast image processor does. Rank r owns GPU r. A router between them
and a loader that puts from the host own "cpu".
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

import devguard
from devguard import simgpu, transport
from devguard.demo import copies

ELEMENTS = 1 << 20  # of float32: 4 MiB, more than fits into a handle


def rank(link: Connection, device: str) -> None:
    """Read each handle that arrives, and answer what came of it; the value itself is checked only when asked for."""
    with devguard.guard(device):
        value: Any = None
        while (message := link.recv()) != "stop":
            if message == "check":
                link.send((float(value[0]), float(value[-1]), int(value.numel())))
            elif message == "free":
                value = None
                wait_until_unmapped()
                torch.cuda.empty_cache()
                link.send(describe_process())
            else:
                value = message.get()
                link.send(str(value.device))
        link.send([device.index for device in devguard.contexts()])


def router(link: Connection, links: list[Connection]) -> None:
    """Pass the handle on to each rank, unopened."""
    with devguard.guard("cpu"):
        handle = link.recv()
        for other in links:
            other.send(handle)
        link.send((sorted(map(str, devguard.contexts())), torch.cuda.is_initialized(), describe_process()["maps"]))


def loader(link: Connection) -> None:
    """Put a tensor from the host, and read it again, in a process without a GPU."""
    with devguard.guard("cpu"), transport.Arena(budget="8MiB") as arena:
        value = arena.put(torch.ones(ELEMENTS)).get()
        theirs = link.recv().get()  # it was on a GPU
        devices = [str(value.device), str(theirs.device)]
        link.send((devices, sorted(map(str, devguard.contexts())), torch.cuda.is_initialized(), float(theirs[-1])))


def describe_process() -> dict[str, Any]:
    """Return the open descriptors of this process, and the bytes of arenas that it has mapped."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    ranges = [line.split()[0].split("-") for line in lines if "devguard-transport" in line]
    mapped = sum(int(end, 16) - int(start, 16) for start, end in ranges)
    return {"descriptors": len(os.listdir("/proc/self/fd")), "maps": mapped}


def wait_until_unmapped() -> None:
    """Wait until the thread that listens for the arena has given its maps back."""
    deadline = time.monotonic() + 20
    while describe_process()["maps"] and time.monotonic() < deadline:
        time.sleep(0.01)


def bytes_by_gpu(gpus: int) -> list[int]:
    """Return what all living processes together hold on each GPU."""
    living = [process for process in simgpu.state() if process.alive]
    return [sum(process.devices[index].bytes for process in living) for index in range(gpus)]


def main(ranks: int) -> None:
    """Send the payload, and measure."""
    log = Path(os.environ["DEVGUARD_SIM_LOG"])
    spawn = multiprocessing.get_context("spawn")
    links = []
    for index in range(ranks):
        link, theirs = spawn.Pipe()
        spawn.Process(target=rank, args=(theirs, f"cuda:{index}"), daemon=True).start()
        theirs.close()
        links.append(link)
    result: dict[str, Any] = {}
    with devguard.guard("cuda:0"):
        # All contexts and the allocators' first blocks are there before the measurement.
        with transport.Arena(budget="8MiB") as arena:
            warm = arena.put(torch.ones(1 << 15).to("cuda:0"), to=ranks)
            for link in links:
                link.send(warm)
            answer(links)
        answer(links, "free")
        del warm
        shared = set(os.listdir("/dev/shm"))
        source = torch.arange(ELEMENTS, dtype=torch.float32).to("cuda:0")
        before, own_before = bytes_by_gpu(ranks), describe_process()
        ranks_before = answer(links, "free")

        arena = transport.Arena(budget="64MiB")
        start = copies.size(log)
        handle = arena.put(source, to=ranks)
        result["router"] = ask(router, handle, links)
        result["devices"] = answer(links)
        result["copies"] = copies.read(log, start)._asdict()
        result["growth"] = [now - then for now, then in zip(bytes_by_gpu(ranks), before, strict=True)]
        result["values"] = answer(links, "check")
        usage = arena.usage()
        result["usage"] = {"in_use": usage.in_use, "peak": usage.peak, "leases": len(usage.leases)}

        result["loader"] = ask(loader, arena.put(source))
        arena.close()
        result["after"] = {"allocated": arena.usage().allocated, "in_use": arena.usage().in_use}
        del arena, handle
        gc.collect()
        left = answer(links, "free")
        result["left"] = {
            "growth": [now - then for now, then in zip(bytes_by_gpu(ranks), before, strict=True)],
            "ranks": [now == then for now, then in zip(left, ranks_before, strict=True)],
            "own": describe_process() == own_before,
            "shm": sorted(name for name in set(os.listdir("/dev/shm")) - shared if "devguard" in name),
        }
    result["contexts"] = answer(links, "stop")
    result["own_contexts"] = [device.index for device in devguard.contexts()]
    result["registering"] = sorted(
        {int(line.split()[0]) for line in log.read_text().splitlines() if "hostRegister" in line}
    )
    result["pids"] = [os.getpid(), *sorted(process.pid for process in simgpu.state() if process.pid != os.getpid())]
    print(json.dumps(result))


def ask(program: Any, message: Any, *arguments: Any) -> Any:
    """Start a process, send it a message, and return its answer after its end."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=program, args=(theirs, *arguments))
    process.start()
    theirs.close()
    with ours:
        ours.send(message)
        found = ours.recv()
    process.join()
    process.close()
    return found


def answer(links: list[Connection], command: str = "") -> list[Any]:
    """Send a command to all ranks, unless they are at work already, and return their answers."""
    for link in links:
        if command:
            link.send(command)
    return [link.recv() for link in links]


if __name__ == "__main__":
    main(int(sys.argv[1]))
