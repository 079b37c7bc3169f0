"""A program without devguard in it: the processes that Lightning Fabric starts are guarded by the environment.

devguard run -- python examples/launchers/with_fabric.py
"""

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy


def main():
    """Let rank 0 send a batch that it made on its GPU; print where each rank received it."""
    gloo = DDPStrategy(process_group_backend="gloo")  # simulated GPUs have no NCCL; "ddp" on real ones
    fabric = Fabric(accelerator="cuda", devices=2, strategy=gloo)
    fabric.launch()
    batch = torch.ones(3).to(fabric.device) if fabric.global_rank == 0 else None
    batch = fabric.broadcast(batch)  # The tag of the batch is cuda:0 on every process.
    lines = [fabric.broadcast(f"rank {rank}: batch on {batch.device}", src=rank) for rank in range(2)]
    if fabric.global_rank == 0:
        print(*lines, sep="\n")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
