"""IPC-INDEX: a CUDA IPC handle carries the sender's index."""

import torch
import torch.multiprocessing as mp

HELD = {}


def _send(queue, done, index):
    queue.put(torch.arange(8.0).to(f"cuda:{index}"))
    done.wait()


def before(mode):
    context = mp.get_context("fork")  # Fork is fast, and CUDA is not initialised yet.
    for index in (0, 1):
        queue, done = context.Queue(), context.Event()
        process = context.Process(target=_send, args=(queue, done, index), daemon=True)
        process.start()
        HELD[index] = (queue, done, process)


def _finish():
    for _, done, process in HELD.values():
        done.set()
        process.join()


def _receive(index):
    try:
        tensor = HELD[index][0].get()  # STRAY
        return tensor.cpu().tolist()
    finally:
        _finish()


def stray():
    return _receive(0)


def behaves():
    return _receive(1)


def REPAIRED(result):
    return result == list(range(8)) and not torch._C._cuda_hasPrimaryContext(0)
