"""The dashboard and what feeds it: every metric that it shows is one that the gateway counts, and the other way round."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.metrics import MetricWrapperBase

from orchestrator.serving.access import SCOPES
from orchestrator.serving.envelope import Metrics

CLUSTER = Path(__file__).parent.parent.parent / "cluster"
GRAFANA = CLUSTER / "grafana"
SERIES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}
FROM_PROMETHEUS = {"instance", "job"}
UNITS = {"reqps", "cps", "s", "decbytes", "short", "percentunit", "none"}
"""Grafana's names; it shows what it does not know as a suffix."""


def series() -> dict[str, set[str]]:
    """Name in an expression -> labels."""
    counted = [value for value in vars(Metrics()).values() if isinstance(value, MetricWrapperBase)]
    known: dict[str, set[str]] = {}
    for metric in counted:
        (family,) = metric.describe()
        for suffix in SERIES[family.type]:
            more = {"le"} if suffix == "_bucket" else set[str]()
            known[family.name + suffix] = {*metric._labelnames, *more}
    return known


def dashboard() -> dict[str, Any]:
    values: dict[str, Any] = json.loads((GRAFANA / "dashboards/endpoint.json").read_text(encoding="utf-8"))
    return values


def loaded(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


PANELS: list[dict[str, Any]] = dashboard()["panels"]
EXPRESSIONS: list[str] = [target["expr"] for panel in PANELS for target in panel["targets"]]


def names_in(expression: str) -> set[str]:
    return set(re.findall(r"\borchestrator_\w+", expression))


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_every_metric_and_label_is_one_that_the_gateway_has(expression: str) -> None:
    known = series()
    assert names_in(expression) and names_in(expression) <= known.keys()
    for name, selector in re.findall(r"\b(orchestrator_\w+)\{(.*?)\}", expression):
        assert set(re.findall(r"(\w+)\s*[=!]", selector)) <= known[name]
    grouped = ",".join(re.findall(r"\b(?:by|on|group_left)\s*\((.*?)\)", expression))
    labels = set[str]().union(*(known[name] for name in names_in(expression))) | FROM_PROMETHEUS
    assert {label.strip() for label in grouped.split(",") if label.strip()} <= labels


def test_every_metric_of_the_gateway_is_shown_somewhere() -> None:
    shown = set[str]().union(*(names_in(expression) for expression in EXPRESSIONS))
    for metric in {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in series()}:
        assert any(name.startswith(metric) for name in shown), metric


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_an_expression_is_whole_and_of_the_chosen_model(expression: str) -> None:
    for opening, closing in ("()", "{}", "[]"):
        assert expression.count(opening) == expression.count(closing)
    for name in names_in(expression):
        if "model" in series()[name]:
            assert re.search(rf'\b{name}\{{[^}}]*model=~"\$model"', expression), "one that the variable chooses"
        if name.endswith(("_total", "_bucket", "_sum", "_count")):
            assert re.search(rf"rate\({name}\{{[^}}]*\}}\[\$__rate_interval\]\)", expression), "a count that only grows"
    assert ("histogram_quantile" in expression) == ("_bucket{" in expression and "by (le, model)" in expression)


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_a_panel_says_what_it_shows_and_in_which_unit(panel: dict[str, Any]) -> None:
    assert panel["title"] and panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"] in UNITS
    assert all(target["legendFormat"] for target in panel["targets"])
    references = [target["refId"] for target in panel["targets"]]
    assert len(set(references)) == len(references) > 0
    is_share = ") / " in panel["targets"][0]["expr"] and "mean" not in panel["targets"][0]["legendFormat"]
    assert (panel["fieldConfig"]["defaults"]["unit"] == "percentunit") == is_share
    is_time = all("_seconds" in target["expr"] for target in panel["targets"])
    assert (panel["fieldConfig"]["defaults"]["unit"] == "s") == is_time


def test_no_panel_lies_on_another() -> None:
    assert len({panel["id"] for panel in PANELS}) == len({panel["title"] for panel in PANELS}) == len(PANELS)
    squares = [
        {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        for place in (panel["gridPos"] for panel in PANELS)
    ]
    assert all(not one & other for one, other in combinations(squares, 2))
    assert max(x for square in squares for x, _ in square) < 24


def test_the_dashboard_asks_the_data_source_that_is_provisioned() -> None:
    (source,) = loaded(GRAFANA / "provisioning/datasources/prometheus.yaml")["datasources"]
    expected = {"type": source["type"], "uid": source["uid"]}
    (variable,) = dashboard()["templating"]["list"]
    asked = [variable["datasource"], *(panel["datasource"] for panel in PANELS)]
    asked += [target["datasource"] for panel in PANELS for target in panel["targets"]]
    assert all(each == expected for each in asked) and source["type"] == "prometheus"
    texts = re.findall(r'"uid": "(.*?)"', (GRAFANA / "dashboards/endpoint.json").read_text(encoding="utf-8"))
    assert set(texts) == {source["uid"], dashboard()["uid"]}
    interval = loaded(CLUSTER / "prometheus.yml")["global"]["scrape_interval"]
    assert source["jsonData"]["timeInterval"] == interval, "or rates are taken over too short a time"


def test_the_variable_lists_the_models_that_were_asked() -> None:
    (variable,) = dashboard()["templating"]["list"]
    assert (variable["name"], variable["includeAll"], variable["allValue"]) == ("model", True, ".*")
    (metric, label) = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"]).groups()  # type: ignore[union-attr]
    assert label in series()[metric] and variable["definition"] == variable["query"]["query"]


def test_the_provider_finds_the_dashboard() -> None:
    (provider,) = loaded(GRAFANA / "provisioning/dashboards/endpoint.yaml")["providers"]
    assert (provider["type"], provider["options"]["path"]) == ("file", "/var/lib/grafana/dashboards")
    assert [path.name for path in (GRAFANA / "dashboards").iterdir()] == ["endpoint.json"]
    assert dashboard()["schemaVersion"] >= 39 and "id" not in dashboard(), "Grafana gives it one"


def test_prometheus_shows_a_key_from_a_file_and_has_none_itself() -> None:
    text = (CLUSTER / "prometheus.yml").read_text(encoding="utf-8")
    (job,) = yaml.safe_load(text)["scrape_configs"]
    assert job["metrics_path"] == "/metrics"
    assert job["authorization"].keys() == {"type", "credentials_file"} and job["authorization"]["type"] == "Bearer"
    assert "orc_" not in text, "the beginning of a key"
    (scope,) = re.findall(r"--scope (\w+)", text)
    assert scope in SCOPES and scope == "admin", "what /metrics takes"
