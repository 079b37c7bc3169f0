"""A library that selects a device and does not restore it, and decodes data with device tags."""

import torch


def warm_up():
    torch.cuda.set_device(3)  # strays: test_a_library_leaves_its_device, test_it_fails_anyway_and_strays


def tidy():
    """Select a device for a while, and restore the previous one."""
    before = torch.cuda.current_device()
    torch.cuda.set_device(before)


def decode(data):
    import pickle

    return pickle.loads(data)  # strays: test_a_stray_in_a_library, test_it_swallows_the_error, test_an_async_unittest
