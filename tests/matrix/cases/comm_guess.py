"""COMM-GUESS: ``barrier()`` on NCCL guesses the device from the rank."""

import os
import tempfile

import torch
import torch.distributed as dist


def before(mode):
    os.environ["TORCH_DIST_USE_NCCL2"] = "0"  # torch 2.15's other group does not load NCCL before use.
    store = os.path.join(tempfile.mkdtemp(), "store")
    dist.init_process_group("nccl", init_method=f"file://{store}", rank=0, world_size=1)


def stray():
    dist.barrier()  # STRAY


def behaves():
    dist.barrier(device_ids=[1])


def REPAIRED(result):
    return not torch._C._cuda_hasPrimaryContext(0)
