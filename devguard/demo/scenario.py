"""One pass of the demonstration, run as a process of its own: the tokenizer, which starts the ranks.

``python -m devguard.demo.scenario '<JSON>'``. The JSON holds ``guarded`` (bool), ``ranks`` (int), ``images``
(list of paths), ``folder`` (a scratch directory), ``state`` (the simulation's state file, null on real GPUs)
and ``events`` (a file descriptor to which one JSON object a line is written: ``{"stage": ...}``, then
``{"result": ...}`` or ``{"error": ...}``).
"""

from __future__ import annotations

import json
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from devguard.demo import DemoError
from devguard.demo.crew import Crew
from devguard.demo.pictures import read_all
from devguard.demo.worker import answer, serve, serve_guarded
from devguard.errors import DevGuardError

__all__ = ["STAGES", "perform"]

STAGES = (
    "start the ranks",
    "cut the pictures into patches",
    "tensor-parallel: rank 0 receives, then broadcasts",
    "data-parallel: one message to each rank",
    "measure",
)
DISTRIBUTED_LOOPBACK = "GLOO_SOCKET_IFNAME"


def main(arguments: list[str]) -> int:
    """Perform the pass that the JSON in ``arguments[0]`` describes; return the exit status."""
    task = json.loads(arguments[0])
    with open(task.pop("events"), "w", buffering=1, encoding="utf-8") as events:

        def tell(**event: Any) -> None:
            events.write(json.dumps(event) + "\n")

        try:
            result = perform(stage=lambda text: tell(stage=text), **task)
        except DevGuardError as error:
            tell(error=str(error))
        except Exception:  # noqa: BLE001 - it must reach the parent, whatever it is
            tell(error=f"the tokenizer process failed.\n{traceback.format_exc()}".rstrip())
        else:
            tell(result=result)
            return 0
    return 1


def perform(
    guarded: bool, ranks: int, images: list[str], folder: str, state: str | None, stage: Callable[[str], None]
) -> dict[str, Any]:
    """Send one batch of pictures to every rank, both ways, and measure who holds what.

    Parameters
    ----------
    guarded : bool
        Whether the ranks' entry point is the decorated one.
    ranks : int
        How many ranks; rank r owns ``cuda:r``.
    images : list of str
        Picture files; the built-in one if empty.
    folder : str
        An empty directory for the ranks' meeting point.
    state : str or None
        The simulation's state file. None: each process reports on itself.
    stage : callable
        Called with the name of each stage as it begins.

    Returns
    -------
    dict
        ``stray_bytes``, ``stray_contexts``, ``values_equal``, ``answers``, ``processes`` and ``torch``,
        ``images``, ``request_bytes``; plain data. Bytes are peaks.
    """
    if any(name == "lo" for _, name in socket.if_nameindex()):
        os.environ.setdefault(DISTRIBUTED_LOOPBACK, "lo")  # gloo: do not depend on how this machine resolves its name
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    stage(STAGES[0])
    with Crew(ranks, serve_guarded if guarded else serve, os.path.join(folder, "meeting")) as crew:
        stage(STAGES[1])  # while the ranks import torch
        import torch

        from devguard.demo.image_patches import batch
        from devguard.demo.transport import ImageRequest, send_request

        pixel_values, grid = batch(read_all(images))
        expected = answer(ImageRequest(pixel_values, grid))
        request = ImageRequest(pixel_values.to("cuda:0"), grid.to("cuda:0"))  # as a fast image processor leaves them
        crew.gather("ready")

        stage(STAGES[2])
        crew.tell("broadcast")
        with crew.watching(0) as link:
            send_request(link, request)
        answers = [{"transport": "tensor-parallel", **reply} for reply in _numbered(crew.gather("answer"))]

        stage(STAGES[3])
        for rank in range(ranks):
            crew.tell("direct", rank)
            with crew.watching(rank) as link:
                send_request(link, request)
        answers += [{"transport": "data-parallel", **reply} for reply in _numbered(crew.gather("answer"))]

        stage(STAGES[4])
        crew.tell("report")
        reports = crew.gather("report")
        processes = [_process("tokenizer", os.getpid(), None, _own_report(torch))]
        for rank, (process, report) in enumerate(zip(crew.processes, reports, strict=True)):
            if not guarded:
                report["owner"] = f"cuda:{rank}"  # said to torch alone, by set_device
            processes.append(_process(f"rank {rank}", process.pid or 0, rank, report))
        if state is not None:
            _ask_simulation(processes, Path(state))  # the ranks still hold what they got
    for reply in answers:
        reply["equal"] = reply["digest"] == expected["digest"]
    on_gpu_0 = [
        device for process in processes if process["rank"] for device in process["devices"] if device["index"] == 0
    ]
    return {
        "stray_bytes": sum(device["peak_bytes"] for device in on_gpu_0),
        "stray_contexts": sum(device["context"] for device in on_gpu_0),
        "values_equal": len(answers) == 2 * ranks and all(reply["equal"] for reply in answers),
        "answers": answers,
        "processes": processes,
        "torch": torch.__version__,
        "images": [
            {"file": Path(path).name, "grid_thw": row}
            for path, row in zip(images or ["picture.jpg"], grid.tolist(), strict=True)
        ],
        "request_bytes": pixel_values.nbytes + grid.nbytes,
    }


def _numbered(replies: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"rank": rank, **reply} for rank, reply in enumerate(replies)]


def _own_report(torch: Any) -> dict[str, Any]:
    """Return the tokenizer's own report; it works on GPU 0 on purpose."""
    used = {
        "index": 0,
        "context": True,
        "bytes": torch.cuda.memory_reserved(0),
        "peak_bytes": torch.cuda.max_memory_reserved(0),
    }
    return {"owner": "cuda:0", "devices": [used], "strays": []}


def _process(name: str, pid: int, rank: int | None, report: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "pid": pid, "rank": rank, **report}


def _ask_simulation(processes: list[dict[str, Any]], state: Path) -> None:
    """Replace what the processes say of themselves by what the simulated driver counted."""
    from devguard import simgpu

    counted = {process.pid: process.devices for process in simgpu.state(state)}
    for process in processes:
        if process["pid"] not in counted:
            raise DemoError(
                f"{process['name']} (pid {process['pid']}) is not in the simulation's state file {state}: it "
                "does not run on "
                "simulated GPUs. Something in its environment comes before the simulation (LD_PRELOAD, "
                "LD_LIBRARY_PATH)."
            )
        process["devices"] = [
            {
                "index": device.index,
                "context": bool(device.context),
                "bytes": device.bytes,
                "peak_bytes": device.peak_bytes,
            }
            for device in counted[process["pid"]]
            if device.context or device.peak_bytes
        ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
