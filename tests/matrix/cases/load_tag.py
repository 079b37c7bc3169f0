"""LOAD-TAG: ``torch.load`` without ``map_location`` obeys the file's ``cuda:0``."""

import io

import torch

from tests.helpers.tagging import tagged


def _file(tag):
    file = io.BytesIO()
    with tagged(tag):
        torch.save({"x": torch.arange(8.0)}, file)
    file.seek(0)
    return file


def stray():
    return torch.load(_file("cuda:0"))  # STRAY


def behaves():
    return torch.load(_file("cuda:0"), map_location="cuda")


def REPAIRED(result):
    return result["x"].device.index == 1
