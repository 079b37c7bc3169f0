"""STREAM-EVENT: a stream and an event are made on a thread that has selected no device."""

import torch

import devguard
from tests.matrix.lost import on_a_lost_thread


def _make():
    stream, event = torch.cuda.Stream(), torch.cuda.Event()  # STRAY
    event.record()
    return stream.device.index, event.device.index


def _make_by_index():
    stream, event = torch.cuda.Stream(1), torch.cuda.Event()
    event.record(stream)
    return stream.device.index, event.device.index


def guarded(mode, work):
    devguard.install(mode=mode, device=1)
    return work()


def stray():
    return on_a_lost_thread(_make)


def behaves():
    return on_a_lost_thread(_make_by_index)


def REPAIRED(result):
    return result == (1, 1)
