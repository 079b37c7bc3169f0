"""BOOKKEEPING: ``mem_get_info`` and similar calls open device 0 on a thread that has selected no device."""

import torch

import devguard
from tests.matrix.lost import on_a_lost_thread


def _ask():
    return torch.cuda.mem_get_info()  # STRAY


def _ask_by_index():
    return torch.cuda.mem_get_info(1)


def guarded(mode, work):
    devguard.install(mode=mode, device=1)
    return work()


def stray():
    return on_a_lost_thread(_ask)


def behaves():
    return on_a_lost_thread(_ask_by_index)


def REPAIRED(result):
    return not torch._C._cuda_hasPrimaryContext(0)
