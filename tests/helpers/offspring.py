"""The work of child processes in the tests of the door ``children``; a spawned child imports this module."""

from __future__ import annotations

import multiprocessing
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

import devguard

TOUCH_LINE = 23


class OpensCuda(Dataset[Any]):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        error = None
        try:
            torch.ones(1, device="cuda")  # TOUCH_LINE
        except Exception as raised:  # noqa: BLE001 - the test compares its type
            error = type(raised).__name__
        return report() | {"error": error}


class StaysOnHost(OpensCuda):
    def __getitem__(self, index: int) -> dict[str, Any]:
        torch.ones(1)
        return report()


def report() -> dict[str, Any]:
    contexts = [device.index for device in devguard.contexts()]
    strays = [stray.as_dict() for stray in devguard.strays()]
    owner, status = devguard.owner(), devguard.status()
    row = status["doors"]["children"]
    return {
        "owner": owner and str(owner),
        "mode": status["mode"],
        "strays": [stray for stray in strays if stray["door"] != "native"],
        "contexts": contexts,
        "taken": row.get("taken_over"),
        "failures": row.get("failures"),
        "owned": status["owned"],
    }


def load(method: str, kind: type[Dataset[Any]] = OpensCuda) -> dict[str, Any]:
    (item,) = DataLoader(kind(), batch_size=None, num_workers=1, multiprocessing_context=method)
    return dict(item)


def send_report(queue: Any) -> None:
    row = report()
    with devguard.guard("cpu"):
        row["guarded"] = report()
    queue.put(row)


def send_report_of_child(queue: Any) -> None:
    queue.put(run_in_child(multiprocessing.get_start_method()))


def try_cuda(queue: Any) -> None:
    try:
        torch.ones(1, device="cuda")
    except RuntimeError as error:
        queue.put(str(error))
    else:
        queue.put("")


def run_in_child(method: str, target: Any = send_report) -> Any:
    context = multiprocessing.get_context(method)
    queue = context.SimpleQueue()
    process = context.Process(target=target, args=(queue,))
    process.start()
    process.join()
    assert process.exitcode == 0
    return queue.get()
