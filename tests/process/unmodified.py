"""A program that does not use devguard: it starts processes in every way, and each unpickles one message.

``python unmodified.py MESSAGE`` prints one JSON object: for each process the device of the message's tensor, and the
devices on which the process held a context. The message comes from a process on cuda:0.
"""

import json
import multiprocessing
import os
import pickle
import subprocess
import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset


def receive(message):
    tensor = pickle.loads(message)
    indices = () if torch.cuda._is_in_bad_fork() else range(torch.cuda.device_count())  # CUDA does not work there.
    contexts = [index for index in indices if torch._C._cuda_hasPrimaryContext(index)]
    return [str(tensor.device), contexts]


def worker(rank, message, answers):
    torch.cuda.set_device(rank)
    for _ in range(3):
        found = receive(message)
    answers.put([rank, found])


def spawned(rank, message, file):
    torch.cuda.set_device(rank)
    Path(f"{file}.{rank}").write_text(json.dumps(receive(message)))


class Messages(Dataset):
    def __init__(self, message):
        self.message = message

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return receive(self.message)


def start(method, message, ranks):
    context = multiprocessing.get_context(method)
    answers = context.SimpleQueue()
    processes = [context.Process(target=worker, args=(rank, message, answers)) for rank in ranks]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * len(ranks)
    return sorted(answers.get() for _ in ranks)


def wrapped(file):
    """Start a process as numactl does, and every launcher that is a shell script."""
    command = ["sh", "-c", 'exec "$@"', "wrapper", "env", "LOCAL_RANK=3", "LOCAL_WORLD_SIZE=4"]
    command += [sys.executable, __file__, "--alone", file]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def alone(file):
    print(json.dumps(receive(Path(file).read_bytes())))


def main(file):
    message = Path(file).read_bytes()
    found = {"fork": start("fork", message, [1, 2])}
    multiprocessing.set_forkserver_preload(["torch"])
    found["forkserver"] = start("forkserver", message, [1, 2])
    found["spawn"] = start("spawn", message, [1])
    torch.multiprocessing.spawn(spawned, (message, file), nprocs=2)
    found["mp.spawn"] = [json.loads(Path(f"{file}.{rank}").read_text()) for rank in range(2)]
    found["subprocess"] = wrapped(file)
    torch.cuda.set_device(1)
    for method in ("fork", "forkserver"):
        workers = DataLoader(Messages(message), batch_size=None, num_workers=1, multiprocessing_context=method)
        found[f"DataLoader {method}"] = list(workers)
    found["this process"] = receive(message)
    found["mode"] = os.environ.get("DEVGUARD")
    print(json.dumps(found))


if __name__ == "__main__":
    if sys.argv[1] == "--alone":
        alone(sys.argv[2])
    else:
        main(sys.argv[1])
