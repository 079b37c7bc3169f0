"""Fixtures with data as another process would send it, made on a GPU of its own."""

import asyncio
import inspect
import io
import pickle

import pytest
import torch

import devguard


@pytest.fixture(scope="session")
def received():
    """A pickle of a tensor on cuda:3."""
    with devguard.unguarded():
        return pickle.dumps(torch.ones(8).to("cuda:3"))


@pytest.fixture(scope="session")
def checkpoint():
    file = io.BytesIO()
    with devguard.unguarded():
        torch.save({"weight": torch.ones(16).to("cuda:3")}, file)
    return file.getvalue()


@pytest.fixture(scope="session")
def foreign():
    """A tensor on cuda:3, made outside every guard."""
    with devguard.unguarded():
        return torch.ones(8).to("cuda:3")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """Run tests that are coroutines, as plugins for asyncio do."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    names = pyfuncitem._fixtureinfo.argnames
    asyncio.run(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in names}))
    return True
