"""The record of a stray, as plain data and as text."""

from __future__ import annotations

import json
import pickle

import pytest
import torch

import devguard
from tests.helpers import tagging

pytestmark = pytest.mark.usefixtures("clean")


PAYLOAD = tagging.dumps(torch.arange(4.0))


def test_a_record_is_plain_data_fit_for_json() -> None:
    with devguard.guard("cpu"):
        pickle.loads(PAYLOAD)
    (stray,) = devguard.strays()
    back = json.loads(json.dumps(stray.as_dict()))
    assert back["site"]["file"] == __file__
    assert back["count"] == 1
    assert back["bytes"] == 16
    assert back["stack"][0]["line"] > 0
    assert pickle.loads(pickle.dumps(stray)) == stray


def test_the_text_of_a_record_is_one_line() -> None:
    with devguard.guard("cpu"):
        pickle.loads(PAYLOAD)
    (stray,) = devguard.strays()
    assert str(stray) == f"load: cuda:3 -> cpu [owner cpu, repaired] 1 x, 16 bytes, at {stray.site}"
