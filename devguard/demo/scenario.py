"""Run one pass of the demonstration as a separate process: the tokenizer, which starts the ranks.

``python -m devguard.demo.scenario '<JSON>'``. The JSON holds ``guarded`` (bool), ``ranks`` (int), ``images`` (list of
paths), ``folder`` (a scratch directory), ``state`` (the simulation's state file, null on real GPUs), ``events`` (a file
descriptor), and optionally the other parameters of `perform`. The process writes one JSON object a line to ``events``:
``{"stage": ...}`` for each stage, then ``{"result": ...}`` or ``{"error": ...}``.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from devguard.demo import DemoError
from devguard.demo.costs import Costs
from devguard.demo.crew import ANSWER_LIMIT, Crew
from devguard.demo.pictures import read_all
from devguard.demo.worker import answer, serve, serve_guarded
from devguard.errors import DevGuardError
from devguard.transport import Arena, Handle

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
ROOM = 1 << 16  # bytes beside the tensors of a request: the pickle around them, and the rest of a page
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
    guarded: bool,
    ranks: int,
    images: list[str],
    folder: str,
    state: str | None,
    stage: Callable[[str], None],
    *,
    transport: str = "pickle",
    measured: bool = False,
    log: str | None = None,
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
    transport : str
        ``"pickle"``: the messages hold the request. ``"host"``: they hold its handle, and the request lies in host
        memory, once (`devguard.transport`).
    measured : bool
        Whether to measure what sending costs.
    log : str or None
        The simulation's log, which counts the copies.

    Returns
    -------
    dict
        ``stray_bytes``, ``stray_contexts``, ``values_equal``, ``answers``, ``processes``, ``torch``, ``images``,
        ``request_bytes`` and ``costs`` (of `Costs.as_dict`, or None), as plain data. Stray bytes are peaks.
    """
    _set_defaults()
    stage(STAGES[0])
    with (
        Crew(ranks, serve_guarded if guarded else serve, os.path.join(folder, "meeting")) as crew,
        contextlib.ExitStack() as stack,
    ):
        stage(STAGES[1])  # while the ranks import torch
        import torch

        from devguard.demo.image_patches import make_batch
        from devguard.demo.transport import ImageRequest

        pixel_values, grid = make_batch(read_all(images))
        expected = answer(ImageRequest(pixel_values, grid))
        # A fast image processor leaves its tensors on this device.
        request = ImageRequest(pixel_values.to("cuda:0"), grid.to("cuda:0"))
        crew.gather("ready")

        pids = [os.getpid(), *(process.pid or 0 for process in crew.processes)]
        costs = Costs(pids, log) if measured else None
        arena = None
        if transport == "host":  # with room for two requests: a third waits until the first one is read
            arena = stack.enter_context(Arena("cpu", budget=2 * (pixel_values.nbytes + grid.nbytes + ROOM)))
        parcel = Parcel(request, arena)
        stage(STAGES[2])
        answers = _send("tensor-parallel", _broadcast, crew, parcel, costs)
        stage(STAGES[3])
        answers += _send("data-parallel", _send_to_each, crew, parcel, costs)
        for reply in answers:
            reply["equal"] = reply["digest"] == expected["digest"]
        stage(STAGES[4])
        processes = _measure(crew, guarded, state)
        cost = None if costs is None else costs.as_dict(processes, arena)
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
        "costs": cost,
    }


def _set_defaults() -> None:
    """Set environment variables for the ranks, where the user has not set them."""
    if any(name == "lo" for _, name in socket.if_nameindex()):
        os.environ.setdefault(GLOO_INTERFACE, "lo")  # gloo must not depend on how this machine's name is resolved
    os.environ.setdefault("OMP_NUM_THREADS", "1")


class Parcel:
    """The request as it is sent: itself, or a handle of it.

    Parameters
    ----------
    request : ImageRequest
        The request, on the tokenizer's GPU.
    arena : Arena or None
        Where it is put; None to send it itself.
    """

    def __init__(self, request: ImageRequest, arena: Arena | None) -> None:
        self._request, self._arena = request, arena

    def prepare(self, readers: int) -> ImageRequest | Handle:
        """Return what to send to this number of readers."""
        if self._arena is None:
            return self._request
        return self._arena.put(self._request, to=readers, timeout=ANSWER_LIMIT)


def _send(
    way: str, send: Callable[[Crew, Parcel], None], crew: Crew, parcel: Parcel, costs: Costs | None
) -> list[dict[str, Any]]:
    """Send the request in one way, until all ranks hold it; then return their answers."""
    with costs.measure(way) if costs else contextlib.nullcontext():
        send(crew, parcel)
        crew.gather("received")
    crew.send("answer")
    replies = crew.gather("answer")
    return [{"transport": way, "rank": rank, **reply} for rank, reply in enumerate(replies)]


def _broadcast(crew: Crew, parcel: Parcel) -> None:
    """Send the request to rank 0, which broadcasts it."""
    from devguard.demo.transport import send_request

    crew.send("broadcast")
    with crew.link_to(0) as link:
        send_request(link, parcel.prepare(len(crew.links)))


def _send_to_each(crew: Crew, parcel: Parcel) -> None:
    """Send the request to each rank separately."""
    from devguard.demo.transport import send_request

    for rank in range(len(crew.links)):
        crew.send("direct", rank)
        with crew.link_to(rank) as link:
            send_request(link, parcel.prepare(1))


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
