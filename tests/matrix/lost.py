"""A thread that has selected no device and that devguard cannot place, for the cases."""

import _thread
import threading

__all__ = ["on_a_lost_thread"]


def on_a_lost_thread(make):
    """Run `make` on a thread of ``_thread``, started as from C; return its result or raise its error."""
    got, ended = [], threading.Lock()
    ended.acquire()

    def run():
        try:
            got.append(make())
        except Exception as error:  # noqa: BLE001 - raised again in the caller
            got.append(error)
        finally:
            ended.release()

    _thread.start_new_thread(run, ())
    ended.acquire()
    if isinstance(got[0], Exception):
        raise got[0]
    return got[0]
