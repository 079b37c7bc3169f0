"""A rank of a launcher that does not use devguard: it writes down the device of all that it loads."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import multiprocessing
import pickle
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from tests.helpers.surroundings import Surroundings


def load(folder: str) -> list[str]:
    return [
        str(pickle.loads(Path(folder, "message").read_bytes()).device),
        str(torch.load(Path(folder, "zip")).device),
        str(torch.empty(1, device="cuda").device),
    ]


def child(folder: str) -> None:
    torch.cuda.set_device(1)
    Path(folder, "child").write_text(json.dumps(load(folder)))


def main(surroundings: Surroundings, folder: str, results: str) -> None:
    surroundings.before_first_guard()
    surroundings.after_first_guard()
    found: dict[str, Any] = {}
    process = multiprocessing.get_context("fork").Process(target=child, args=(folder,))
    process.start()
    process.join()
    found["child"] = json.loads(Path(folder, "child").read_text())
    torch.cuda.set_device(1)
    found["main"] = load(folder)
    thread = threading.Thread(target=lambda: found.update(thread=load(folder)))
    thread.start()
    thread.join()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        found["pool"] = pool.submit(load, folder).result()

    async def work() -> list[str]:
        await asyncio.sleep(0)
        return load(folder)

    async def everything() -> None:
        (found["task"],) = await surroundings.together(work())
        found["worker"] = await surroundings.in_thread(load, folder)

    surroundings.run(everything())
    found["contexts"] = [index for index in range(4) if torch._C._cuda_hasPrimaryContext(index)]
    surroundings.remove()
    Path(results).write_text(json.dumps(found))
