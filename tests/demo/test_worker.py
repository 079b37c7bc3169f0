"""One rank of the demonstration, without GPUs: its answers, and how it fails."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch

import devguard
from devguard.demo import worker

pytestmark = pytest.mark.usefixtures("clean")


def request(scale: float = 1.0) -> Any:
    return types.SimpleNamespace(
        pixel_values=torch.arange(8.0).reshape(2, 4) * scale, image_grid_thw=torch.tensor([[1, 2, 4]])
    )


def test_the_answer_describes_the_request() -> None:
    found = worker.answer(request())
    assert (found["device"], found["mean"], found["grid"], found["patches"]) == ("cpu", 3.5, [[1, 2, 4]], 2)


def test_the_digest_depends_on_the_values_and_not_on_the_memory_layout() -> None:
    first, same, other = request(), request(), request(2.0)
    same.pixel_values = same.pixel_values.t().contiguous().t()
    digests = [worker.answer(each)["digest"] for each in (first, same, other)]
    assert digests[0] == digests[1] != digests[2]
    assert len(digests[0]) == 64


def test_a_rank_that_fails_sends_its_traceback_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise LookupError("no such file")

    sent: list[Any] = []
    monkeypatch.setattr(worker, "_serve", fail)
    with pytest.raises(LookupError):
        worker.serve(types.SimpleNamespace(send=sent.append), 0, 1, "meeting")  # type: ignore[arg-type]
    ((kind, text),) = sent
    assert kind == "failed"
    assert "LookupError: no such file" in text


def test_the_guarded_rank_owns_the_gpu_of_its_argument(monkeypatch: pytest.MonkeyPatch, cuda: Any) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(worker, "_serve", lambda *arguments: seen.append((str(devguard.owner()), cuda.current)))
    link: Any = None
    worker.serve(link, 2, 3, "meeting")
    worker.serve_guarded(link, 2, 3, "meeting")
    assert seen == [("None", 0), ("cuda:2", 2)]
