"""RANK-INDEX: rank r of a job takes ``cuda:r``, although the ranks see their GPUs in another order: two own one GPU."""

import os
import tempfile

import torch

import devguard

JOB = {"TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
HELD = []


def before(mode):
    os.environ.update(JOB, XDG_RUNTIME_DIR=tempfile.mkdtemp())
    HELD.append(_rank_0())
    os.environ.update(LOCAL_RANK="1", CUDA_VISIBLE_DEVICES="0,1" if mode == "behaves" else "1,0")


def _rank_0():
    """Start the other rank; it ends with this process. The pipe by which it does."""
    ready, said = os.pipe()
    end, held = os.pipe()
    if os.fork() == 0:
        os.close(held)
        os.environ.update(LOCAL_RANK="0", CUDA_VISIBLE_DEVICES="0,1")
        with devguard.guard(0):
            os.write(said, b".")
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
