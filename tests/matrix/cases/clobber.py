"""CLOBBER: a library changes the current device and does not put it back."""

import torch

from tests.matrix.cases import some_library


def stray():
    some_library.setup()  # STRAY
    return torch.empty(4, device="cuda"), torch.cuda.mem_get_info()


def behaves():
    some_library.careful()
    return torch.empty(4, device="cuda")
