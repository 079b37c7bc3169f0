"""A program without devguard in it: accelerate's processes are guarded by the environment.

devguard run -- accelerate launch --multi_gpu --num_processes 2 examples/launchers/with_accelerate.py
"""

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object


def main():
    """Let the main process send a batch that it made on its GPU; print where each process received it."""
    dist.init_process_group("gloo")  # simulated GPUs have no NCCL; leave it out on real ones
    accelerator = Accelerator()
    batch = [torch.ones(3).to(accelerator.device) if accelerator.is_main_process else None]
    broadcast_object_list(batch)  # The tag of the batch is cuda:0 on every process.
    lines = gather_object([f"process {accelerator.process_index}: batch on {batch[0].device}"])
    if accelerator.is_main_process:
        print(*lines, sep="\n")
    accelerator.end_training()


if __name__ == "__main__":
    main()
