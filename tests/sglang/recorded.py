"""Recorded holdings of SGLang 0.5.23's servers on two simulated GPUs, for the tests of the judgement."""

from __future__ import annotations

import dataclasses

from devguard.simgpu import DeviceState
from tests.sglang.placement import Answer, Holding, Served

__all__ = [
    "ANSWERS",
    "CONTEXT",
    "DATA_PARALLEL",
    "FREED",
    "GUARDED_DP",
    "GUARDED_TP",
    "IMAGES",
    "NOTHING",
    "TENSOR_PARALLEL",
    "change",
    "holding",
]

MIB = 1 << 20
NOTHING = (False, 0, 0)
CONTEXT = (True, 0, 0)
IMAGES = (True, 2 * MIB, 2 * MIB)
FREED = (False, 0, 2 * MIB)


def holding(name: str, owner: int | None, *devices: tuple[bool, int, int]) -> Holding:
    states = tuple(DeviceState(k, held, now, peak, 1, 0, 0) for k, (held, now, peak) in enumerate(devices))
    return Holding(100, name, owner, states)


ANSWERS = (Answer(200, "a cat", (-1.5, -0.25)), Answer(200, "a dog", (-1.25, -0.5)))

# As seen on servers of SGLang 0.5.23.
TENSOR_PARALLEL = Served(
    ANSWERS,
    (
        holding("tokenizer", 0, IMAGES, NOTHING),
        holding("scheduler TP0", 0, IMAGES, NOTHING),
        holding("scheduler TP1", 1, IMAGES, CONTEXT),
        holding("detokenizer", None, NOTHING, NOTHING),
    ),
    30.0,
)
DATA_PARALLEL = Served(
    ANSWERS,
    (
        holding("tokenizer", 0, IMAGES, NOTHING),
        holding("scheduler DP0", 0, IMAGES, NOTHING),
        holding("scheduler DP1", 1, IMAGES, CONTEXT),
        holding("DP controller", None, IMAGES, NOTHING),
        holding("detokenizer", None),
    ),
    30.0,
)


def change(served: Served, name: str, *devices: tuple[bool, int, int]) -> Served:
    changed = tuple(holding(one.role, one.owner, *devices) if one.role == name else one for one in served.holdings)
    return dataclasses.replace(served, holdings=changed)


GUARDED_TP = change(TENSOR_PARALLEL, "scheduler TP1", NOTHING, IMAGES)
GUARDED_DP = change(change(DATA_PARALLEL, "scheduler DP1", NOTHING, IMAGES), "DP controller", NOTHING, NOTHING)
