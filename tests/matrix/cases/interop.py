"""INTEROP: DLPack imports a tensor that lies on another device."""

import torch


class _Foreign:
    """Another framework's array on cuda:0."""

    def __init__(self):
        self.tensor = torch.empty(4, device="cuda:0")

    def __dlpack__(self, **options):
        with torch.cuda.device(0):
            return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()


def stray():
    array = _Foreign()
    return torch.from_dlpack(array)  # STRAY


def behaves():
    return torch.from_dlpack(torch.empty(4, device="cuda"))
