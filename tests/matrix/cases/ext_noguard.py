"""EXT-NOGUARD: a custom operator without a device guard works on device 0, wherever its argument lies."""

import ctypes

import torch

import devguard

LIBRARY = torch.library.Library("devguard_matrix", "DEF")
LIBRARY.define("scale(Tensor x, int device) -> Tensor")


def _scale(x, device):
    """Allocate a workspace on a device of its own choice, as the C++ of such an operator does."""
    driver = ctypes.CDLL("libcuda.so.1")
    context, workspace = ctypes.c_void_p(), ctypes.c_uint64()
    steps = (
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device),
        driver.cuCtxPushCurrent_v2(context),
        driver.cuMemAlloc_v2(ctypes.byref(workspace), ctypes.c_size_t(1 << 20)),
        driver.cuCtxPopCurrent_v2(ctypes.byref(context)),
    )
    assert not any(steps), steps
    return x.detach()


LIBRARY.impl("scale", _scale, "CUDA")


def guarded(mode, work):
    step = devguard.guard(1, mode=mode)(work)
    return step()  # STRAY


def stray():
    return torch.ops.devguard_matrix.scale(torch.empty(4, device="cuda"), 0)


def behaves():
    return torch.ops.devguard_matrix.scale(torch.empty(4, device="cuda"), 1)
