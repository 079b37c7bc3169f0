"""Metrics as Prometheus gets them."""

from __future__ import annotations

import urllib.request
from collections.abc import Mapping

from prometheus_client.parser import text_string_to_metric_families

__all__ = ["get", "OPENER", "parse", "scrape", "Scrape"]

Scrape = dict[str, dict[tuple[str, ...], float]]  # by name, then by the values of the labels, ordered by their names

OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def get(url: str, headers: Mapping[str, str] | None = None) -> str:
    """Return what a server answers."""
    with OPENER.open(urllib.request.Request(url, headers=dict(headers or {})), timeout=60) as answer:
        found: bytes = answer.read()
    return found.decode()


def parse(text: str) -> Scrape:
    """Return the series of a text in Prometheus's format; no series stands twice."""
    found: Scrape = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = tuple(value for _, value in sorted(sample.labels.items()))
            assert labels not in found.setdefault(sample.name, {}), sample
            found[sample.name][labels] = sample.value
    return found


def scrape(url: str) -> Scrape:
    """Return the series that a server has now."""
    return parse(get(url))
