"""BOOKKEEPING: ``mem_get_info`` and its like open the current device, which is not where the work is."""

import torch


def stray():
    torch.empty(4, device="cuda:1")
    torch._C._cuda_maybeExchangeDevice(0)  # a library that leaves another device current
    return torch.cuda.mem_get_info()  # STRAY


def behaves():
    torch.empty(4, device="cuda:1")
    return torch.cuda.mem_get_info()


def REPAIRED(result):
    return not torch._C._cuda_hasPrimaryContext(0)
