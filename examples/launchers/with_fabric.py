"""Nothing of devguard in the program: the processes that Lightning Fabric starts are guarded by environment.

devguard run -- python examples/launchers/with_fabric.py
"""

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy


def main():
    """Let rank 0 send a batch that it made on its GPU; say where each rank received it."""
    gloo = DDPStrategy(process_group_backend="gloo")  # simulated GPUs have no NCCL; "ddp" on real ones
    fabric = Fabric(accelerator="cuda", devices=2, strategy=gloo)
    fabric.launch()
    batch = torch.ones(3).to(fabric.device) if fabric.global_rank == 0 else None
    batch = fabric.broadcast(batch)  # it says cuda:0 to everybody
    lines = [fabric.broadcast(f"rank {rank}: batch on {batch.device}", src=rank) for rank in range(2)]
    if fabric.global_rank == 0:
        print(*lines, sep="\n")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
