"""A library that chooses devices by itself."""

import torch


def warm_up():
    torch.cuda.set_device(3)  # strays: test_a_library_leaves_its_device, test_it_fails_by_itself_and_strays


def tidy():
    """Chooses a device for a while, as it should."""
    before = torch.cuda.current_device()
    torch.cuda.set_device(before)


def decode(data):
    import pickle

    return pickle.loads(data)  # strays: test_a_stray_in_a_library, test_it_swallows_the_error, test_an_async_unittest
