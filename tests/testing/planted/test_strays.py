"""Each test here uses a GPU that it does not own, without declaring it."""

import asyncio
import contextlib
import io
import pickle
import threading
import unittest

import pytest
import safetensors.torch
import sloppy
import torch

import devguard


def test_a_pickle_with_a_tag(received):
    pickle.loads(received)  # strays: test_a_pickle_with_a_tag


def test_a_checkpoint_with_a_tag(checkpoint):
    torch.load(io.BytesIO(checkpoint))  # strays: test_a_checkpoint_with_a_tag


def test_a_checkpoint_that_is_sent_elsewhere(checkpoint):
    torch.load(io.BytesIO(checkpoint), map_location="cuda:2")  # strays: test_a_checkpoint_that_is_sent_elsewhere


def test_a_stray_in_a_library(received):
    sloppy.decode(received)


def test_it_swallows_the_error(received):
    with contextlib.suppress(Exception):
        sloppy.decode(received)


@pytest.mark.devguard(device="cuda:2")
def test_a_thread_on_device_0():
    with devguard.guard("cuda:2", doors={"threads": "error"}):
        thread = threading.Thread(target=lambda: torch.zeros(8, device="cuda"))
        thread.start()  # strays: test_a_thread_on_device_0
        thread.join()


@pytest.mark.devguard(device="cuda:2")
def test_a_bare_cuda(tmp_path):
    safetensors.torch.save_file({"weight": torch.ones(4)}, tmp_path / "file")
    safetensors.torch.load_file(tmp_path / "file", device="cuda")  # strays: test_a_bare_cuda


def test_memory_of_another_framework(foreign):
    torch.from_dlpack(foreign)  # strays: test_memory_of_another_framework


def test_a_library_leaves_its_device():
    sloppy.warm_up()


def test_it_leaves_the_device_unwatched():  # strays: test_it_leaves_the_device_unwatched
    torch.cuda.device(2).__enter__()


def test_it_leaves_a_scope():  # strays: test_it_leaves_a_scope
    devguard.guard("cuda:2").__enter__()


def test_it_leaves_a_patch():  # strays: test_it_leaves_a_patch
    original = torch.serialization._get_restore_location
    torch.serialization._get_restore_location = lambda map_location: original(map_location)


def test_it_names_another_gpu():
    torch.zeros(8, device="cuda:2")  # strays: test_it_names_another_gpu


def test_it_names_another_gpu_again():
    torch.zeros(8, device="cuda:2")  # strays: test_it_names_another_gpu_again


def test_it_fails_anyway_and_strays():
    sloppy.warm_up()
    assert torch.cuda.device_count() == 5


async def test_a_coroutine(received):
    await asyncio.sleep(0)
    pickle.loads(received)  # strays: test_a_coroutine


@pytest.fixture
def loaded(received):
    return pickle.loads(received)  # strays: test_a_fixture


def test_a_fixture(loaded):
    pass


class TestCase(unittest.TestCase):
    def test_a_unittest(self):
        torch.zeros(8, device="cuda:2")  # strays: test_a_unittest


class AsyncTestCase(unittest.IsolatedAsyncioTestCase):
    async def test_an_async_unittest(self):
        sloppy.decode(pickle.dumps(Tagged()))


class Tagged:
    """Pickles in the form of a tensor on cuda:3, but holds no tensor."""

    def __reduce__(self):
        with devguard.unguarded():
            return pickle.loads, (pickle.dumps(torch.ones(4).to("cuda:3")),)
