"""Weights in buckets, from a trainer to engines that come and go: the readers of each put are named.

python examples/transport/weights.py                             # no GPU needed
devguard sim --gpus 2 -- python examples/transport/weights.py    # on simulated GPUs
"""

import multiprocessing

import torch

import devguard
from devguard import transport

BUCKETS = {"layer.0": 1 << 18, "layer.1": 1 << 18, "head": 1 << 17}  # elements of each
DEVICES = {"a": "cuda:0", "b": "cuda:1"} if torch.cuda.is_available() else {"a": "cpu", "b": "cpu"}


def engine(name, address, inbox, done):
    with devguard.guard(DEVICES[name]), transport.join(address, name=name):
        parameters = {key: torch.empty(size, device=DEVICES[name]) for key, size in BUCKETS.items()}
        for step, handle in iter(inbox.get, None):
            with handle.view() as bucket:  # copied from shared memory straight into the parameters
                for key, value in bucket.items():
                    parameters[key].copy_(value)
                    done.put(f"engine {name}, step {step}: {key} = {value[0]:.1f} on {parameters[key].device}")


if __name__ == "__main__":
    spawn = multiprocessing.get_context("spawn")
    engines, done = {}, spawn.SimpleQueue()
    with transport.Arena("cpu", budget="2100KiB") as arena:  # two buckets
        for step, names in enumerate((["a"], ["a", "b"], ["b"])):
            for name in names - engines.keys():
                engines[name] = spawn.SimpleQueue()
                spawn.Process(target=engine, args=(name, arena.address, engines[name], done)).start()
            for name in engines.keys() - names:
                engines.pop(name).put(None)
            for key, size in BUCKETS.items():
                handle = arena.put({key: torch.full((size,), step + 0.5)}, to=names)  # waits for room
                for name in names:
                    engines[name].put((step, handle))
            for _ in range(len(names) * len(BUCKETS)):
                print(done.get())
        engines["b"].put(None)
