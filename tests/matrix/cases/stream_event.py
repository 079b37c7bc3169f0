"""STREAM-EVENT: a stream and an event made on a thread that has chosen no device."""

import _thread
import threading

import torch

import devguard


def _on_a_thread_of_its_own(make):
    """Run `make` on a thread that nobody can place: ``_thread``, as C code starts them."""
    got, ended = [], threading.Lock()
    ended.acquire()

    def run():
        try:
            got.append(make())
        except Exception as error:  # noqa: BLE001 - raised in the caller
            got.append(error)
        finally:
            ended.release()

    _thread.start_new_thread(run, ())
    ended.acquire()
    if isinstance(got[0], Exception):
        raise got[0]
    return got[0]


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
    return _on_a_thread_of_its_own(_make)


def behaves():
    return _on_a_thread_of_its_own(_make_by_index)


def REPAIRED(result):
    return result == (1, 1)
