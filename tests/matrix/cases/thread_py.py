"""THREAD-PY: a new Python thread starts on device 0."""

from concurrent.futures import ThreadPoolExecutor

import torch


def _work():
    return torch.empty(4, device="cuda")


def _work_by_index():
    return torch.empty(4, device="cuda:1")


def stray():
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(_work).result()  # STRAY


def behaves():
    with ThreadPoolExecutor(1, initializer=torch.cuda.set_device, initargs=(1,)) as pool:
        return pool.submit(_work_by_index).result()


def REPAIRED(result):
    return result.device.index == 1
