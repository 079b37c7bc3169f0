"""CHILD-PROC: a loader worker loads a sample that was saved on a GPU, and opens its own context for it."""

import os
import tempfile

import torch
from torch.utils.data import DataLoader, Dataset

import devguard
from tests.helpers.tagging import tagged
from tests.matrix.harness import row

PATH = os.path.join(tempfile.gettempdir(), f"devguard-matrix-{os.getpid()}.pt")


class _Saved(Dataset):
    def __init__(self, path):
        self.path = path

    def __len__(self):
        return 1

    def __getitem__(self, index):
        sample = torch.load(self.path)  # STRAY
        return {
            "sample": sample.cpu(),
            "device": str(sample.device),
            "pid": os.getpid(),
            "strays": [row(stray) for stray in devguard.strays()],
        }


def before(mode):
    with tagged("cpu" if mode == "behaves" else "cuda:0"):
        torch.save(torch.arange(8.0), PATH)


def stray():
    try:
        (item,) = DataLoader(_Saved(PATH), batch_size=None, num_workers=1, multiprocessing_context="spawn")
        return item
    finally:
        os.unlink(PATH)


behaves = stray


def REPAIRED(result):
    return result["device"] == "cpu" and result["sample"].tolist() == list(range(8))


def STRAYS(result):
    return result["strays"]


def WORKERS(result):
    return [result["pid"]]
