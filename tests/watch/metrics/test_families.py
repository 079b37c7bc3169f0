"""The names of the metrics follow Prometheus, and their labels can be kept."""

from __future__ import annotations

from devguard.watch.metrics.families import FAMILIES, LONGEST_LABEL, labels_of, series_names


def test_names_follow_the_conventions_of_prometheus() -> None:
    for name, family in FAMILIES.items():
        assert name.startswith("devguard_")
        assert name.endswith("_total") == (family.kind == "counter"), name
        assert not set(family.labels) & {"pid", "site", "file", "line", "address", "le", "job", "instance"}


def test_a_histogram_has_three_kinds_of_series() -> None:
    names = series_names()
    assert "devguard_transport_release_seconds_bucket" in names
    assert "devguard_transport_release_seconds" not in names
    assert len(names) == len(FAMILIES) + 2


def test_what_a_log_says_is_made_fit_for_a_label() -> None:
    assert labels_of("a\nb\x1b[31m", "\udcff", "é") == ("a\\nb\\x1b[31m", "\\udcff", "é")
    assert labels_of("x" * 1000) == ("x" * LONGEST_LABEL,)
