"""One line guards a worker: the decorator on its entry point.

A parent makes a batch on cuda:0 and sends it by pickle to two workers, each of which owns one GPU. Without the
decorator, worker 1 would rebuild the batch on cuda:0 and hold a context there.

    devguard sim --gpus 2 -- python examples/decorator.py
"""

import multiprocessing
import pickle
import sys

import torch

import devguard


@devguard.guard(argument="gpu_id")
def worker(message, gpu_id, answers):
    """Report the batch and its device."""
    batch = pickle.loads(message)  # The message names cuda:0; the guard puts the batch on this worker's GPU.
    held = ", ".join(str(device) for device in devguard.contexts())
    answers.put(f"worker {gpu_id}: batch {batch.cpu().tolist()} on {batch.device}, contexts on {held}")


def main():
    """Start one worker after the other."""
    if torch.cuda.device_count() < 2:
        sys.exit("Two GPUs are needed. To simulate them: devguard sim --gpus 2 -- python examples/decorator.py")
    message = pickle.dumps(torch.tensor([1.0, 2.0, 3.0]).to("cuda:0"))
    spawn = multiprocessing.get_context("spawn")
    for gpu_id in range(2):
        answers = spawn.SimpleQueue()
        process = spawn.Process(target=worker, args=(message, gpu_id, answers))
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(f"worker {gpu_id} ended with status {process.exitcode}")
        print(answers.get())


if __name__ == "__main__":
    main()
