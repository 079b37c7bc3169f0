"""A program without devguard in it: the environment guards torchrun's processes, each on its local rank's GPU.

devguard run -- torchrun --nproc-per-node 2 examples/launchers/with_torchrun.py
"""

import os

import torch
import torch.distributed as dist


def main():
    """Let rank 0 send a batch that it made on its GPU; print where each rank received it."""
    dist.init_process_group("gloo")
    local_rank = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(local_rank)
    batch = [torch.ones(3).to("cuda") if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(batch)  # The tag of the batch is cuda:0 on every rank.
    lines = [None] * dist.get_world_size()
    dist.all_gather_object(lines, f"rank {dist.get_rank()}, local rank {local_rank}: batch on {batch[0].device}")
    if dist.get_rank() == 0:
        print(*lines, sep="\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
