"""Tests of multi-GPU code on a laptop: each test owns a GPU and fails if a line puts work on another device.

    pytest --devguard=error --devguard-gpus 2 -q --tb=no examples/pytest

Two of these tests stray, and fail.
"""

import io

import pytest
import torch

import devguard


def resume(checkpoint):
    """Read a checkpoint onto the device that it names."""
    return torch.load(io.BytesIO(checkpoint))


def resume_here(checkpoint, device):
    """Read a checkpoint onto this process's device."""
    return torch.load(io.BytesIO(checkpoint), map_location=device)


@pytest.fixture
def checkpoint():
    """Return a checkpoint that was written by the process that owns cuda:0."""
    file = io.BytesIO()
    with devguard.guard("cuda:0"):
        torch.save({"weight": torch.zeros(1024, device="cuda")}, file)
    return file.getvalue()


@pytest.mark.devguard(device="cuda:1")
def test_it_resumes_on_its_own_device(checkpoint, gpu_owner):
    assert resume_here(checkpoint, gpu_owner)["weight"].device == gpu_owner


@pytest.mark.devguard(device="cuda:1")
def test_it_resumes(checkpoint):
    assert resume(checkpoint)


def test_a_buffer():
    torch.zeros(2048, device="cuda:1")


@pytest.mark.devguard(device="cuda:1", mode="repair")
def test_devguard_repairs_it(checkpoint, gpu_owner, devguard_strays):
    assert resume(checkpoint)["weight"].device == gpu_owner
    assert [stray.action for stray in devguard_strays] == ["repaired"]
