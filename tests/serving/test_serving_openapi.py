"""Schemathesis: requests made up from the OpenAPI description, valid and not, against the real server."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)
from serving_live import NAME, Live

CHECKS = [
    not_a_server_error,
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
]
OPERATIONS = [
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    *(("GET", path) for path in ("/v1/models", "/v1/models/{name}", "/v1/operating_points", "/health", "/ready")),
    ("GET", "/metrics"),
]


@pytest.fixture(scope="module")
def api(server: Live):
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def test_every_operation_is_listed(api) -> None:
    found = {(result.ok().method.upper(), result.ok().path) for result in api.get_all_operations()}
    assert found == set(OPERATIONS)


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_replies_are_as_described(method: str, path: str, mode: GenerationMode, api) -> None:
    examples = 30 if method == "POST" else 5

    @settings(
        max_examples=examples, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(api[path][method].as_strategy(generation_mode=mode))
    def run(case) -> None:
        if mode is GenerationMode.POSITIVE and method == "POST":
            case.body["model"] = NAME  # else no example came further than 404
            case.body["max_tokens"] = min(case.body.get("max_tokens") or 8, 8)
        case.call_and_validate(checks=CHECKS)

    try:
        run()
    except Unsatisfiable:  # an operation without parameters has no wrong ones
        assert mode is GenerationMode.NEGATIVE
        assert method == "GET"
