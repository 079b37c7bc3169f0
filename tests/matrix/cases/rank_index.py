"""RANK-INDEX: rank r takes ``cuda:r``, but the ranks see their GPUs in another order, so two ranks own one GPU."""

import os
import tempfile

import torch

import devguard

JOB = {"TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
HELD = []


def before(mode):
    os.environ.update(JOB, XDG_RUNTIME_DIR=tempfile.mkdtemp())
    HELD.append(_start_rank_0())
    os.environ.update(LOCAL_RANK="1", CUDA_VISIBLE_DEVICES="0,1" if mode == "behaves" else "1,0")


def _start_rank_0():
    """Start the other rank; it ends when the returned end of a pipe closes, with this process."""
    ready, started = os.pipe()
    end, held = os.pipe()
    if os.fork() == 0:
        os.close(held)
        os.environ.update(LOCAL_RANK="0", CUDA_VISIBLE_DEVICES="0,1")
        with devguard.guard(0):
            os.write(started, b".")
            os.read(end, 1)
        os._exit(0)
    os.read(ready, 1)
    return held


def guarded(mode, work):
    with devguard.guard(1, mode=mode):  # STRAY
        return work()


def stray():
    return torch.empty(4, device="cuda:1")


behaves = stray
