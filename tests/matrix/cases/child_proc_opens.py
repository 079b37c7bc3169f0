"""CHILD-PROC (opens CUDA itself): a loader worker allocates a tensor on a GPU."""

import os

import torch
from torch.utils.data import DataLoader, Dataset

import devguard
from tests.matrix.harness import row


class _OnTheGpu(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        torch.empty(4, device="cuda")  # STRAY
        return os.getpid(), [row(stray) for stray in devguard.strays()]


class _OnTheHost(_OnTheGpu):
    def __getitem__(self, index):
        torch.empty(4)
        return os.getpid(), [row(stray) for stray in devguard.strays()]


def _iterate(dataset):
    (item,) = DataLoader(dataset, batch_size=None, num_workers=1, multiprocessing_context="spawn")
    return item


def stray():
    return _iterate(_OnTheGpu())


def behaves():
    return _iterate(_OnTheHost())


def STRAYS(result):
    return result[1]


def WORKERS(result):
    return [result[0]]
