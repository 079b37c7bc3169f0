"""Run one pass of the demonstration as a separate process: the tokenizer, which starts the ranks.

``python -m devguard.demo.scenario '<JSON>'``. The JSON holds ``guarded`` (bool), ``ranks`` (int), ``images`` (list of
paths), ``folder`` (a scratch directory), ``state`` (the simulation's state file, null on real GPUs) and ``events`` (a
file descriptor). The process writes one JSON object a line to ``events``: ``{"stage": ...}`` for each stage, then
``{"result": ...}`` or ``{"error": ...}``.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from devguard.demo import DemoError
from devguard.demo.crew import Crew
from devguard.demo.pictures import read_all
from devguard.demo.worker import answer, serve, serve_guarded
from devguard.errors import DevGuardError

if TYPE_CHECKING:
    from devguard.demo.transport import ImageRequest

__all__ = ["perform", "STAGES"]

STAGES = (
    "start the ranks",
    "cut the pictures into patches",
    "tensor-parallel: rank 0 receives, then broadcasts",
    "data-parallel: one message to each rank",
    "measure",
)
GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"


def main(arguments: list[str]) -> int:
    """Perform the pass that the JSON in ``arguments[0]`` describes; return the exit status."""
    task = json.loads(arguments[0])
    with open(task.pop("events"), "w", buffering=1, encoding="utf-8") as events:

        def emit(**event: Any) -> None:
            events.write(json.dumps(event) + "\n")

        try:
            result = perform(stage=lambda text: emit(stage=text), **task)
        except DevGuardError as error:
            emit(error=str(error))
        except Exception:  # noqa: BLE001 - every error must reach the parent process
            emit(error=f"the tokenizer process failed.\n{traceback.format_exc()}".rstrip())
        else:
            emit(result=result)
            return 0
    return 1


def perform(
    guarded: bool, ranks: int, images: list[str], folder: str, state: str | None, stage: Callable[[str], None]
) -> dict[str, Any]:
    """Send one batch of pictures to all ranks in both ways, and measure what each process holds on each GPU.

    Parameters
    ----------
    guarded : bool
        Whether the ranks' entry point is the decorated one.
    ranks : int
        The number of ranks. Rank r owns ``cuda:r``.
    images : list of str
        Picture files; if empty, the built-in picture.
    folder : str
        An empty directory, for the file through which the ranks find each other.
    state : str or None
        The simulation's state file. If None, each process reports on itself.
    stage : callable
        Called with the name of each stage when it starts.

    Returns
    -------
    dict
        ``stray_bytes``, ``stray_contexts``, ``values_equal``, ``answers``, ``processes``, ``torch``, ``images`` and
        ``request_bytes``, as plain data. Stray bytes are peaks.
    """
    _set_defaults()
    stage(STAGES[0])
    with Crew(ranks, serve_guarded if guarded else serve, os.path.join(folder, "meeting")) as crew:
        stage(STAGES[1])  # while the ranks import torch
        import torch

        from devguard.demo.image_patches import make_batch
        from devguard.demo.transport import ImageRequest

        pixel_values, grid = make_batch(read_all(images))
        expected = answer(ImageRequest(pixel_values, grid))
        # A fast image processor leaves its tensors on this device.
        request = ImageRequest(pixel_values.to("cuda:0"), grid.to("cuda:0"))
        crew.gather("ready")

        stage(STAGES[2])
        answers = _broadcast(crew, request)
        stage(STAGES[3])
        answers += _send_to_each(crew, request)
        for reply in answers:
            reply["equal"] = reply["digest"] == expected["digest"]
        stage(STAGES[4])
        processes = _measure(crew, guarded, state)
    return {
        **_count_strays(processes),
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


def _set_defaults() -> None:
    """Set environment variables for the ranks, where the user has not set them."""
    if any(name == "lo" for _, name in socket.if_nameindex()):
        os.environ.setdefault(GLOO_INTERFACE, "lo")  # gloo must not depend on how this machine's name is resolved
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def _broadcast(crew: Crew, request: ImageRequest) -> list[dict[str, Any]]:
    """Send the request to rank 0, which broadcasts it; return the answers of all ranks."""
    from devguard.demo.transport import send_request

    crew.send("broadcast")
    with crew.link_to(0) as link:
        send_request(link, request)
    return _gather_answers(crew, "tensor-parallel")


def _send_to_each(crew: Crew, request: ImageRequest) -> list[dict[str, Any]]:
    """Send the request to each rank separately; return the answers of all ranks."""
    from devguard.demo.transport import send_request

    for rank in range(len(crew.links)):
        crew.send("direct", rank)
        with crew.link_to(rank) as link:
            send_request(link, request)
    return _gather_answers(crew, "data-parallel")


def _gather_answers(crew: Crew, transport: str) -> list[dict[str, Any]]:
    replies = crew.gather("answer")
    return [{"transport": transport, "rank": rank, **reply} for rank, reply in enumerate(replies)]


def _measure(crew: Crew, guarded: bool, state: str | None) -> list[dict[str, Any]]:
    """Return one report for each process, while the ranks still hold their requests."""
    crew.send("report")
    reports = crew.gather("report")
    processes = [{"name": "tokenizer", "pid": os.getpid(), "rank": None, **_report_tokenizer()}]
    for rank, (process, report) in enumerate(zip(crew.processes, reports, strict=True)):
        if not guarded:
            report["owner"] = f"cuda:{rank}"  # Without a guard, only torch.cuda.set_device has named this device.
        processes.append({"name": f"rank {rank}", "pid": process.pid or 0, "rank": rank, **report})
    if state is not None:
        _apply_simulation_counts(processes, Path(state))
    return processes


def _count_strays(processes: list[dict[str, Any]]) -> dict[str, int]:
    """Return the bytes and the contexts that ranks other than rank 0 hold on GPU 0."""
    on_gpu_0 = [
        device for process in processes if process["rank"] for device in process["devices"] if device["index"] == 0
    ]
    return {
        "stray_bytes": sum(device["peak_bytes"] for device in on_gpu_0),
        "stray_contexts": sum(device["context"] for device in on_gpu_0),
    }


def _report_tokenizer() -> dict[str, Any]:
    """Return this process's own report; the tokenizer works on GPU 0 on purpose."""
    import torch

    used = {
        "index": 0,
        "context": True,
        "bytes": torch.cuda.memory_reserved(0),
        "peak_bytes": torch.cuda.max_memory_reserved(0),
    }
    return {"owner": "cuda:0", "devices": [used], "strays": []}


def _apply_simulation_counts(processes: list[dict[str, Any]], state: Path) -> None:
    """Replace each process's own figures by the ones that the simulated driver counted."""
    from devguard import simgpu

    counted = {process.pid: process.devices for process in simgpu.state(state)}
    for process in processes:
        if process["pid"] not in counted:
            raise DemoError(
                f"{process['name']} (pid {process['pid']}) is not in the simulation's state file {state}, so it does "
                "not run on simulated GPUs. Its environment may override the simulation: check LD_PRELOAD and "
                "LD_LIBRARY_PATH."
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
