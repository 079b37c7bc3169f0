"""Make up a result of the demonstration."""

from __future__ import annotations

from typing import Any

MIB = 1 << 20


def device(index: int, mebibytes: int) -> dict[str, Any]:
    return {"index": index, "context": True, "bytes": mebibytes * MIB, "peak_bytes": mebibytes * MIB}


def stray(rank: int, line: int = 43) -> dict[str, Any]:
    return {
        "door": "load",
        "action": "repaired",
        "source": "cuda:0",
        "target": f"cuda:{rank}",
        "site": {"file": "/srv/server.py", "line": line, "function": "receive"},
        "code": "return pickle.loads(message)",
        "count": 2,
        "bytes": 18 * MIB,
    }


def run(guarded: bool, ranks: int) -> dict[str, Any]:
    processes = [
        {"name": "tokenizer", "pid": 1, "rank": None, "owner": "cuda:0", "devices": [device(0, 20)], "strays": []}
    ]
    for rank in range(ranks):
        is_home = guarded or rank == 0
        devices = [device(rank, 38)] if is_home else [device(0, 38), device(rank, 0)]
        strays = [stray(rank), stray(rank, line=73)] if guarded and rank else []
        processes.append(
            {
                "name": f"rank {rank}",
                "pid": 2 + rank,
                "rank": rank,
                "owner": f"cuda:{rank}",
                "devices": devices,
                "strays": strays,
            }
        )
    return {
        "stray_bytes": 0 if guarded else 38 * MIB * (ranks - 1),
        "stray_contexts": 0 if guarded else ranks - 1,
        "values_equal": True,
        "answers": [{"equal": True}] * (2 * ranks),
        "processes": processes,
    }


def result(ranks: int = 4) -> dict[str, Any]:
    return {
        "backend": "simulated",
        "reason": "torch sees no GPU here",
        "ranks": ranks,
        "torch": "2.13.0+cu130",
        "images": [{"file": "picture.jpg", "grid_thw": [1, 54, 74]}],
        "request_bytes": 3996 * 1176 * 4 + 24,
        "devguard": "0.1.0",
        "unguarded": run(False, ranks),
        "guarded": run(True, ranks),
    }


def hosted(ranks: int = 4) -> dict[str, Any]:
    """Make up a result of ``--transport host``."""
    found = result(ranks)
    size = found["request_bytes"]
    found["transport"] = "host"
    for name, down, up in (("unguarded", 2, 2 * ranks), ("guarded", 1, ranks)):
        found[name]["costs"] = {
            "copies": {
                "tensor-parallel": {"down": down * size, "up": up * size, "across": 0},
                "data-parallel": {"down": ranks * size, "up": up * size, "across": 0},
            },
            "contexts": 2 * ranks if name == "unguarded" else ranks + 1,
            "gpu_0_peak": (20 + 38 * (ranks if name == "unguarded" else 1)) * MIB,
            "host_peak": 36 * MIB if name == "guarded" else 180 * MIB,
            "shm_peak": 0,
        }
    return found
