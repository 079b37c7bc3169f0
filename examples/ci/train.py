"""Four ranks that resume from a checkpoint; a program without devguard in it. gate.sh runs it in CI."""

import os

import torch
import torch.distributed as dist

CHECKPOINT = "checkpoint.pt"


def resume():
    """Return the weights, which rank 0 saved from its GPU."""
    return torch.load(CHECKPOINT)  # A stray in ranks 1 to 3, which the baseline knows: the tag says cuda:0.


def main():
    """Save on rank 0, and resume on all ranks."""
    dist.init_process_group("gloo")
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if dist.get_rank() == 0:
        torch.save({"weight": torch.ones(1024).to("cuda")}, CHECKPOINT)
    dist.barrier()
    resume()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
