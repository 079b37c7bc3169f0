"""Run object collectives of tensors with the tag of a GPU, as one of two ranks over gloo; prints one JSON object.

Arguments: the rank, the rendezvous file, and ``guarded`` or ``unguarded``.
"""

import contextlib
import json
import sys
import warnings

import torch
import torch.distributed as dist

import devguard
from tests.helpers import tagging


def sent(rank):
    return tagging.Envelope(tagging.dumps(torch.full((2,), float(rank))))


def attempt(function):
    try:
        return function()
    except RuntimeError as error:
        return str(error)


def main():
    rank, path, how = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    results = {}

    def gather():
        gathered = [None, None]
        dist.all_gather_object(gathered, sent(rank))
        return [tensor.tolist() for tensor in gathered]

    def broadcast():
        objects = [sent(0) if rank == 0 else None]
        dist.broadcast_object_list(objects, src=0)
        return None if rank == 0 else objects[0].tolist()  # The source keeps its own object.

    with devguard.guard("cpu") if how == "guarded" else contextlib.nullcontext():
        results["all_gather_object"] = attempt(gather)
        results["broadcast_object_list"] = attempt(broadcast)
    results["strays"] = [
        {
            "source": s.source,
            "action": s.action,
            "count": s.count,
            "file": s.site and s.site.file,
            "line": s.site.source,
        }
        for s in devguard.strays()
    ]
    dist.destroy_process_group()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
