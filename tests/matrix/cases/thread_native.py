"""THREAD-NATIVE: a C++ thread opens a context on its current device, which is 0."""

import ctypes

import devguard


def _native_thread(device):
    """Run cuDevicePrimaryCtxRetain on a thread that Python did not start."""
    driver, libc = ctypes.CDLL("libcuda.so.1"), ctypes.CDLL(None)
    context, thread = ctypes.c_void_p(), ctypes.c_ulong()
    entry = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(
        lambda _: driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
    )
    libc.pthread_create(ctypes.byref(thread), None, entry, None)
    libc.pthread_join(thread, None)


def guarded(mode, work):
    step = devguard.guard(1, mode=mode)(work)
    return step()  # STRAY


def stray():
    _native_thread(0)


def behaves():
    _native_thread(1)
