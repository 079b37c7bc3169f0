"""The list of this machine's GPUs, by NVML, and of the devices that this process sees, by CUDA."""

from __future__ import annotations

import torch

from devguard.doors.contexts.visible_devices import list_gpus, list_visible


def test_nvml_lists_the_gpus_that_cuda_shows_in_the_same_order():
    gpus = list_gpus()
    assert [gpu.uuid for gpu in gpus] == list_visible()
    assert [gpu.name for gpu in gpus] == [torch.cuda.get_device_name(index) for index in range(len(gpus))]
    assert len(gpus) == torch.cuda.device_count() > 1
