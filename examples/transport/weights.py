"""Weights in buckets, from a trainer to engines that come and go: the readers of each put are named.

python examples/transport/weights.py                             # no GPU needed
devguard sim --gpus 2 -- python examples/transport/weights.py    # on simulated GPUs
"""

import multiprocessing

import torch

import devguard
from devguard import transport

BUCKETS = {"layer.0": 1 << 18, "layer.1": 1 << 18, "head": 1 << 17}  # numbers in each


def engine(address, name, device, inbox, answers):
    """Copy each bucket from shared memory into the engine's own parameters; one copy, and no new memory."""
    with devguard.guard(device), transport.join(address, name=name):
        parameters = {key: torch.empty(size, device=device) for key, size in BUCKETS.items()}
        answers.put(f"engine {name} comes")
        for handle in iter(inbox.get, None):
            with handle.view() as bucket:  # This engine's part of the lease ends with the block.
                for key, value in bucket.items():
                    parameters[key].copy_(value)
            answers.put(f"{name}: {key} = {value[0]:.1f} on {parameters[key].device}")


def main():
    """Send the weights of three steps, to engine a, then to both, then to engine b. Two buckets fit into the budget."""
    spawn = multiprocessing.get_context("spawn")
    devices = {"a": "cuda:0", "b": "cuda:1"} if torch.cuda.device_count() > 1 else {"a": "cpu", "b": "cpu"}
    engines = {}
    with transport.Arena("cpu", budget="2100KiB") as arena:
        for step, names in enumerate((["a"], ["a", "b"], ["b"])):
            for name in sorted(names - engines.keys()):
                engines[name] = spawn.SimpleQueue(), spawn.SimpleQueue()
                spawn.Process(target=engine, args=(arena.address, name, devices[name], *engines[name])).start()
                print(engines[name][1].get())
            for name in sorted(engines.keys() - names):
                engines.pop(name)[0].put(None)
            for key, size in BUCKETS.items():
                handle = arena.put({key: torch.full((size,), step + 0.5)}, to=names)  # waits for room
                for name in names:
                    engines[name][0].put(handle)
            for name in names:
                print(f"step {step}", *(engines[name][1].get() for _ in BUCKETS), sep="; ")
        engines["b"][0].put(None)
        print("never more than the budget was in use:", arena.usage().peak <= arena.budget)


if __name__ == "__main__":
    main()
