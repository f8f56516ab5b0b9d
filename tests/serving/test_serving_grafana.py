"""The dashboard of docs/grafana.json: what Grafana's import needs, and that every metric in it exists."""

from __future__ import annotations

import json
import re

from serving_live import ROOT

from moe_prism.serving.metrics import PREFIX, Metrics

BOARD = json.loads((ROOT / "docs" / "grafana.json").read_text())


def test_it_has_what_an_import_needs() -> None:
    assert BOARD["title"]
    assert re.fullmatch(r"[\w-]{1,40}", BOARD["uid"])
    assert "id" not in BOARD, "an id would overwrite a dashboard of the importing Grafana"
    assert BOARD["schemaVersion"] >= 36
    panels = BOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["type"] in {"timeseries", "stat", "gauge", "heatmap"}
        assert panel["title"]
        assert panel["fieldConfig"].keys() >= {"defaults", "overrides"}
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]) > 0
    variables = {variable["name"] for variable in BOARD["templating"]["list"]}
    used = {name for name in re.findall(r"\$\{?(\w+)", json.dumps(BOARD)) if not name.startswith("__")}
    assert used == variables


def test_no_panel_lies_on_another_or_sticks_out() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken
        assert max(x for x, _ in cells) < 24
        taken |= cells


def test_every_query_names_metrics_that_the_server_has() -> None:
    served = set(re.findall(rf"^({PREFIX}\w+)", Metrics("m", 16).text().decode(), re.MULTILINE))
    queries = [target["expr"] for panel in BOARD["panels"] for target in panel["targets"]]
    asked = {name for query in queries for name in re.findall(rf"{PREFIX}\w+", query)}
    assert asked <= served
    assert len(asked) > 12
    assert all(query.count("(") == query.count(")") and query.count("{") == query.count("}") for query in queries)
