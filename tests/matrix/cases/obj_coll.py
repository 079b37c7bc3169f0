"""OBJ-COLL: ``all_gather_object`` and friends rebuild tensors on the sender's index."""

import os
import tempfile

import torch
import torch.distributed as dist

from tests.helpers.tagging import tagged


def _gather(tag):
    folder = tempfile.mkdtemp()
    dist.init_process_group("gloo", init_method=f"file://{os.path.join(folder, 'store')}", rank=0, world_size=1)
    got = [None]
    with tagged(tag):
        dist.all_gather_object(got, {"x": torch.arange(8.0)})  # STRAY
    dist.destroy_process_group()
    return got[0]["x"]


def stray():
    return _gather("cuda:0")


def behaves():
    return _gather("cpu").to("cuda")


def REPAIRED(result):
    return result.device.index == 1
