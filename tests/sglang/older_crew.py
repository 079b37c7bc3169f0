"""Run two ranks with SGLang 0.4.6.post2's own broadcast: ``python -m tests.sglang.older_crew none|decorator FOLDER``.

Rank 0 sends a tensor that the tokenizer left on cuda:0; rank r owns cuda:r. Prints the devices of each rank's tensors.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from pathlib import Path
from typing import Any

from tests.sglang import older  # isort: skip - before SGLang
import sglang.srt.utils as utils
import torch
import torch.distributed as dist

import devguard
from devguard.integrations.sglang import worker

CONTEXT = multiprocessing.get_context("spawn")
__all__ = ["older"]


def run_scheduler(folder: Path, queue: Any, ranks: int, rank: int, gpu_id: int) -> None:
    torch.cuda.set_device(gpu_id)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=ranks)
    sent = [{"pixel_values": torch.arange(4.0).to("cuda:0")}] if rank == 0 else []
    got = [utils.broadcast_pyobj(sent, rank, dist.group.WORLD)[0]["pixel_values"]]
    got.append((utils.point_to_point_pyobj(sent, rank, dist.group.WORLD) or sent)[0]["pixel_values"])
    assert all(tensor.tolist() == [0, 1, 2, 3] for tensor in got)
    queue.put([rank, [str(tensor.device) for tensor in got], [str(device) for device in devguard.contexts()]])
    dist.destroy_process_group()


@worker
def guarded_scheduler(folder: Path, queue: Any, ranks: int, rank: int, gpu_id: int) -> None:
    run_scheduler(folder, queue, ranks, rank, gpu_id)


def main() -> None:
    target = {"none": run_scheduler, "decorator": guarded_scheduler}[sys.argv[1]]
    queue = CONTEXT.Queue()
    processes = [
        CONTEXT.Process(target=target, args=(Path(sys.argv[2]), queue, 2), kwargs={"rank": rank, "gpu_id": rank})
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    reports = sorted(queue.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(20)
    print(json.dumps(reports))


if __name__ == "__main__":
    main()
