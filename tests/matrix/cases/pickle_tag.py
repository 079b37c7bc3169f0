"""PICKLE-TAG: the same tag inside a plain pickle."""

import pickle

import torch

from tests.helpers.tagging import tagged


def _message(tag):
    with tagged(tag):
        return pickle.dumps(torch.arange(8.0))


def stray():
    return pickle.loads(_message("cuda:0"))  # STRAY


def behaves():
    return pickle.loads(_message("cpu")).to("cuda")


def REPAIRED(result):
    return result.device.index == 1
