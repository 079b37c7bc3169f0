"""PIN-THREAD: the DataLoader's pin thread gets the device of the thread that iterates.

Pinning alone opens no context in torch 2.13; the stray occurs when a batch is sent to the current device.
"""

import threading

import torch
from torch.utils.data import DataLoader, TensorDataset


def _iterate(found):
    loader = DataLoader(TensorDataset(torch.arange(4.0)), batch_size=2, num_workers=1, pin_memory=True)
    found.extend(batch.to("cuda", non_blocking=True) for (batch,) in loader)


def stray():
    found = []
    thread = threading.Thread(target=_iterate, args=(found,))
    thread.start()  # STRAY
    thread.join()
    return found


def behaves():
    loader = DataLoader(TensorDataset(torch.arange(4.0)), batch_size=2)
    return [batch.pin_memory().to("cuda", non_blocking=True) for (batch,) in loader]


def REPAIRED(result):
    held = [i for i in range(torch.cuda.device_count()) if torch._C._cuda_hasPrimaryContext(i)]
    return len(result) == 2 and held == [1]
