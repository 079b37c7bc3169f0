"""The dashboard, the alert rules and docs/watch.md name metrics and labels that exist, and can be read by programs."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from typing import Any, get_args

import pytest
import yaml

from devguard.reporting import log_file
from devguard.watch.cells import VERDICTS, Verdict
from devguard.watch.metrics import collector
from devguard.watch.metrics import server as metrics
from devguard.watch.metrics.families import FAMILIES, Family, series_names
from tests.helpers.simulated import ROOT

DOCS = ROOT / "docs"
PAGE = (DOCS / "watch.md").read_text(encoding="utf-8")
DASHBOARD: dict[str, Any] = json.loads((DOCS / "grafana" / "devguard.json").read_text(encoding="utf-8"))
RULES: list[dict[str, Any]] = [
    rule
    for group in yaml.safe_load((DOCS / "grafana" / "alerts.yml").read_text(encoding="utf-8"))["groups"]
    for rule in group["rules"]
]
ADDED = {"job", "instance"}  # by Prometheus, to each series
NAME = re.compile(r"\bdevguard_\w+")


def panels() -> Iterator[dict[str, Any]]:
    yield from DASHBOARD["panels"]


def variables() -> dict[str, dict[str, Any]]:
    return {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}


def queries() -> Iterator[tuple[str, str, str]]:
    """Return each query in PromQL, with where it is and what its legend or message says."""
    for panel in panels():
        for target in panel.get("targets", ()):
            yield f"{panel['title']} {target['refId']}", target["expr"], target["legendFormat"]
    for rule in RULES:
        yield rule["alert"], rule["expr"], " ".join(rule["annotations"].values())
    for name, variable in variables().items():
        if variable["type"] == "query":
            (series, label) = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]).groups()  # type: ignore[union-attr]
            yield f"variable {name}", f"count by ({label}) ({series})", ""


QUERIES = [pytest.param(*query[1:], id=query[0]) for query in queries()]


def family_of(series: str) -> Family:
    return FAMILIES.get(series) or FAMILIES[re.sub(r"_(bucket|count|sum)$", "", series)]


@pytest.mark.parametrize(("query", "text"), QUERIES)
def test_a_query_names_series_and_labels_that_exist(query: str, text: str) -> None:
    names = NAME.findall(query)
    assert names
    assert set(names) <= series_names()
    families = [family_of(name) for name in names if name != "devguard_scrape_success"]
    known = set.intersection(*({*family.labels, *ADDED} for family in families)) if families else {*ADDED}
    if any(name.endswith("_bucket") for name in names):
        known.add("le")
    grouped = {label for group in re.findall(r"\bby \(([^)]*)\)", query) for label in group.split(", ")}
    assert grouped <= known
    for name, matchers in re.findall(r"(devguard_\w+)\{([^}]*)\}", query):
        labels = re.findall(r'(\w+)=~?"[^"]*"(?:, |$)', matchers)
        assert labels, matchers
        assert {*labels} <= {*family_of(name).labels, *ADDED}
    shown = set(re.findall(r"\{\{ ?(?:\$labels\.)?(\w+) ?\}\}", text))
    assert shown <= (grouped or known) | ADDED


@pytest.mark.parametrize(("query", "text"), QUERIES)
def test_counters_are_read_as_rates_and_gauges_are_not(query: str, text: str) -> None:
    rates = set(re.findall(r"\b(?:rate|increase)\((devguard_\w+)", query))
    for name in NAME.findall(query):
        assert (name in rates) == (family_of(name).kind != "gauge"), name


@pytest.mark.parametrize(("query", "text"), QUERIES)
def test_a_verdict_that_a_query_names_exists(query: str, text: str) -> None:
    for verdict in re.findall(r'verdict="([^"]*)"', query):
        assert verdict in VERDICTS
    assert set(get_args(Verdict)) == set(VERDICTS)


def test_the_dashboard_shows_every_metric() -> None:
    shown = {name for _, query, _ in queries() for name in NAME.findall(query)}
    assert {name for name in FAMILIES if not any(each.startswith(name) for each in shown)} == set()


def test_the_dashboard_asks_the_data_source_that_is_chosen() -> None:
    assert variables()["datasource"]["type"] == "datasource"
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    asking = [panel for panel in panels() if panel["type"] != "row"]
    assert all(panel["datasource"] == chosen for panel in asking)
    assert all(target["datasource"] == chosen for panel in asking for target in panel["targets"])
    assert [name for name, each in variables().items() if each.get("datasource", chosen) != chosen] == []
    used = set(re.findall(r"\$(\w+)", json.dumps(DASHBOARD).replace("$__all", "").replace("${datasource}", "")))
    assert used - {"__rate_interval"} == variables().keys() - {"datasource"}


def test_the_panels_lie_side_by_side() -> None:
    numbers = [panel["id"] for panel in panels()]
    assert len(set(numbers)) == len(numbers)
    places = [panel["gridPos"] for panel in panels()]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    for one, other in itertools.combinations(places, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        above = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or above, (one, other)
    assert all(panel["title"] and panel.get("description", panel["type"] == "row") for panel in panels())


def test_the_alerts_are_those_of_the_page() -> None:
    expected = {
        "DevguardStray": ("1m", 'verdict="STRAY"'),
        "DevguardContextOffOwner": ("1m", 'verdict="ctx"'),
        "DevguardTransportWaits": ("1m", "> 0.1"),
        "DevguardScrapeFailed": ("2m", "devguard_scrape_success == 0"),
    }
    assert {rule["alert"] for rule in RULES} == expected.keys()
    for rule in RULES:
        lasts, part = expected[rule["alert"]]
        assert rule["for"] == lasts
        assert part in rule["expr"]
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"].keys() == {"summary", "description"}
        assert f"| `{rule['alert']}` |" in PAGE


def test_the_page_has_every_metric_with_its_type_and_its_labels() -> None:
    rows = re.findall(r"^\| `(devguard_\w+)` \| (\w+) \| (.+) \| (.+) \|$", PAGE, re.MULTILINE)
    assert rows == [
        (name, family.kind, ", ".join(f"`{label}`" for label in family.labels) or "-", family.text)
        for name, family in FAMILIES.items()
    ]
    assert set(NAME.findall(PAGE)) == FAMILIES.keys()


def test_the_configurations_on_the_page_are_valid_yaml() -> None:
    blocks = [yaml.safe_load(block) for block in re.findall(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)]
    prometheus, telemetry = blocks
    targets = prometheus["scrape_configs"][0]["static_configs"]
    assert telemetry["receivers"]["prometheus"]["config"]["scrape_configs"][0]["static_configs"] == targets
    assert targets == [{"targets": ["127.0.0.1:9109"]}]


def test_the_numbers_on_the_page_are_those_of_the_code() -> None:
    assert f"{log_file.MOST_SAMPLED >> 20} MiB of samples" in PAGE
    assert f"until {metrics.ASKED_S / 60:g} minutes after the last one" in PAGE
    assert collector.LOOK_S == 1.0  # "at most once a second"


def test_the_links_of_the_page_lead_to_files() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert (DOCS / target).exists(), target
