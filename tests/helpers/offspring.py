"""What child processes do in the tests of the door ``children``; to be imported by spawned ones."""

from __future__ import annotations

import multiprocessing
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

import devguard

TOUCH_LINE = 23


class Curious(Dataset[Any]):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        error = None
        try:
            torch.ones(1, device="cuda")  # TOUCH_LINE
        except Exception as raised:  # noqa: BLE001 - whatever it is, it is what is shown
            error = type(raised).__name__
        return report() | {"error": error}


class Harmless(Curious):
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


def load(method: str, kind: type[Dataset[Any]] = Curious) -> dict[str, Any]:
    (item,) = DataLoader(kind(), batch_size=None, num_workers=1, multiprocessing_context=method)
    return dict(item)


def tell(queue: Any) -> None:
    row = report()
    with devguard.guard("cpu"):
        row["guarded"] = report()
    queue.put(row)


def tell_through(queue: Any) -> None:
    queue.put(ask(multiprocessing.get_start_method()))


def try_cuda(queue: Any) -> None:
    try:
        torch.ones(1, device="cuda")
    except RuntimeError as error:
        queue.put(str(error))
    else:
        queue.put("")


def ask(method: str, target: Any = tell) -> Any:
    context = multiprocessing.get_context(method)
    queue = context.SimpleQueue()
    process = context.Process(target=target, args=(queue,))
    process.start()
    process.join()
    assert process.exitcode == 0
    return queue.get()
