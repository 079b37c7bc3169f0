"""Tests that keep to their GPU, or declare that they use another."""

import io
import pickle
import threading
import unittest
from concurrent.futures import ThreadPoolExecutor

import pytest
import sloppy
import torch

import devguard


def test_it_works_on_the_device_that_it_owns(gpu_owner):
    assert devguard.owner() == gpu_owner
    assert torch.zeros(8, device="cuda").device == gpu_owner
    assert torch.zeros(8, device=gpu_owner).device == gpu_owner


def test_a_checkpoint_is_loaded_to_a_named_device(checkpoint, gpu_owner):
    assert torch.load(io.BytesIO(checkpoint), map_location=gpu_owner)["weight"].device == gpu_owner
    assert torch.load(io.BytesIO(checkpoint), map_location="cpu")["weight"].device.type == "cpu"


def test_a_library_that_restores_the_device():
    sloppy.tidy()


def test_a_loop_over_the_devices(gpu_owner):
    for index in range(torch.cuda.device_count()):
        torch.cuda.set_device(index)
    torch.cuda.set_device(gpu_owner)


test_a_loop_over_the_devices = pytest.mark.devguard(allow=[1, 2, 3, 0])(test_a_loop_over_the_devices)


@pytest.mark.devguard(device="cuda:2")
class TestOnAnother:
    def test_it_owns_the_device_of_its_marker(self, gpu_owner):
        assert gpu_owner == devguard.owner() == torch.device("cuda:2")
        assert torch.zeros(8, device="cuda").device == gpu_owner

    @pytest.mark.devguard(device=3)
    def test_the_nearest_marker_wins(self, gpu_owner):
        assert gpu_owner == devguard.owner() == torch.device("cuda:3")


@pytest.mark.devguard(allow=["cuda:2"])
def test_a_device_that_is_allowed():
    torch.zeros(8, device="cuda:2")


@pytest.mark.devguard(allow="cuda:3")
def test_a_tag_that_is_allowed(received):
    assert str(pickle.loads(received).device) == "cuda:3"


@pytest.mark.devguard(mode="observe")
def test_a_mode_in_the_marker(received, devguard_strays, gpu_owner):
    assert not devguard_strays
    pickle.loads(received)
    (stray,) = devguard_strays
    assert (stray.door, stray.source, stray.owner) == ("load", "cuda:3", str(gpu_owner))


@pytest.mark.devguard(mode="repair")
def test_repaired(received, gpu_owner, devguard_strays):
    assert pickle.loads(received).device == gpu_owner
    assert [stray.action for stray in devguard_strays] == ["repaired"]


@pytest.mark.devguard(mode="off")
def test_not_guarded():
    torch.zeros(8, device="cuda:2")


def test_an_intended_use_of_another_device():
    with devguard.unguarded():
        torch.zeros(8, device="cuda:2")


def test_a_guard_in_the_test():
    with devguard.guard("cuda:2") as device:
        assert torch.zeros(8, device="cuda").device == device


def test_the_contexts(gpu_owner, devguard_contexts):
    torch.zeros(8, device="cuda")
    assert gpu_owner in devguard_contexts


def test_tasks_of_a_pool(gpu_owner):
    with ThreadPoolExecutor(2) as pool:
        assert pool.submit(torch.cuda.current_device).result() == gpu_owner.index


def test_it_installs_devguard_itself(received):
    before = torch.cuda.current_device()
    devguard.install("repair", "cuda:2")
    assert str(pickle.loads(received).device) == "cuda:2"
    devguard.uninstall()
    torch.cuda.set_device(before)


def test_it_is_guarded_after_that(gpu_owner):
    assert devguard.owner() == gpu_owner
    assert devguard.status()["mode"] == "error"


@pytest.fixture(scope="class")
def on_another():
    with torch.cuda.device(2):
        yield torch.zeros(8, device="cuda")


@pytest.mark.devguard(allow=["cuda:2"])
class TestInAFixturesDevice:
    def test_first(self, on_another):
        assert torch.cuda.current_device() == 2

    def test_second(self, on_another):
        assert torch.cuda.current_device() == 2


def test_a_skip():
    pytest.skip("not today")


@pytest.mark.xfail(strict=True)
def test_an_expected_stray(received):
    pickle.loads(received)


class TestCase(unittest.TestCase):
    def test_it_owns_a_device(self):
        assert torch.zeros(8, device="cuda").device == devguard.owner()

    @unittest.expectedFailure
    def test_expected(self):
        self.fail()


class AsyncTestCase(unittest.IsolatedAsyncioTestCase):
    async def test_it_owns_a_device(self):
        assert torch.zeros(8, device="cuda").device == devguard.owner()


async def test_a_coroutine(gpu_owner):
    assert torch.zeros(8, device="cuda").device == gpu_owner


@pytest.mark.devguard(device="cuda:2")
def test_a_thread_that_devguard_places(gpu_owner, devguard_strays):
    devices = []
    thread = threading.Thread(target=lambda: devices.append(torch.cuda.current_device()))
    thread.start()
    thread.join()
    assert devices == [gpu_owner.index]
    assert [stray.action for stray in devguard_strays] == ["placed"]
