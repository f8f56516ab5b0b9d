from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving_live import NAME, OPTIONS, Live, live_server

from moe_prism.offload import pack_checkpoint
from moe_prism.scheduling import Request
from moe_prism.scheduling.quality import budget_buckets
from moe_prism.serving.metrics import PREFIX, Metrics, Track


def values(text: str) -> dict[str, float]:
    """Sample name and labels but the model's -> value."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = [v for k, v in sorted(sample.labels.items()) if k != "model_name"]
            found[",".join([sample.name.removeprefix(PREFIX), *labels])] = sample.value
    return found


def request(**changes) -> Request:
    return Request(
        **{"id": "a", "arrival": 10.0, "prompt_tokens": 3, "max_tokens": 9, "k_min": 4, "k_active": 16} | changes
    )


def test_a_request_by_hand() -> None:
    metrics = Metrics("m", 16)
    track = Track(request(ttft_ms=600, tpot_ms=200))
    metrics.arrived(3)
    metrics.admitted(0.25)
    for budget, now in ((16, 10.5), (8, 10.75), (4, 11.25)):
        metrics.token(track, budget, now)
    metrics.ended(track, "length")
    found = values(metrics.text().decode())
    expected = {
        "prompt_tokens_total": 3, "generation_tokens_total": 3, "floor_violations_total": 0,
        "time_to_first_token_seconds_sum": 0.5, "inter_token_latency_seconds_sum": 0.75,
        "request_time_per_output_token_seconds_sum": 0.375, "e2e_request_latency_seconds_sum": 1.25,
        "request_queue_time_seconds_sum": 0.25, "token_k_active_sum": 28, "token_k_active_bucket,8.0": 2,
        "request_success_total,length": 1, "request_success_total,stop": 0,
        "slo_requests_total,ttft,met": 1, "slo_requests_total,ttft,missed": 0,
        "slo_requests_total,tpot,met": 0, "slo_requests_total,tpot,missed": 1,
    }  # fmt: skip
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert (track.tokens, track.work) == (3, 28)


def test_a_token_below_its_floor_is_a_violation() -> None:
    metrics = Metrics("m", 16)
    metrics.token(Track(request(k_min=5)), 4, 11.0)
    assert values(metrics.text().decode())["floor_violations_total"] == 1


@pytest.mark.parametrize(("reason", "missed"), [("error", 1), ("abort", 0)])
def test_an_error_misses_its_objectives_and_an_abandoned_request_counts_for_none(reason: str, missed: int) -> None:
    metrics = Metrics("m", 16)
    metrics.ended(Track(request(ttft_ms=1)), reason)
    found = values(metrics.text().decode())
    assert found["slo_requests_total,ttft,missed"] == missed
    assert found[f"request_success_total,{reason}"] == 1


@pytest.mark.parametrize("full", [1, 4, 16, 64, 65, 100, 1000])
def test_buckets_end_at_full_budget(full: int) -> None:
    buckets = budget_buckets(full)
    assert buckets[-1] == full
    assert len(buckets) <= 64
    assert buckets == sorted(set(buckets))


def test_names_are_those_of_vllm_where_it_has_them() -> None:
    names = {family.name for family in text_string_to_metric_families(Metrics("m", 16).text().decode())}
    assert {
        "moe_prism:num_requests_running", "moe_prism:num_requests_waiting", "moe_prism:kv_cache_usage_perc",
        "moe_prism:prompt_tokens", "moe_prism:generation_tokens", "moe_prism:request_success",
        "moe_prism:time_to_first_token_seconds", "moe_prism:inter_token_latency_seconds",
        "moe_prism:request_time_per_output_token_seconds", "moe_prism:e2e_request_latency_seconds",
        "moe_prism:request_queue_time_seconds",
    } <= names  # fmt: skip


def test_what_a_server_counts_is_what_its_client_saw(checkpoint: Path) -> None:
    with live_server(checkpoint) as live:
        client, usage = live.client(), []
        for tokens in (1, 5, 30):
            reply = client.completions.create(
                model=NAME, prompt="the sea", max_tokens=tokens, n=2,
                extra_body={"ignore_eos": True, "vllm_xargs": {"k_active": 6, "ttft_ms": 60000, "tpot_ms": 60000}},
            )  # fmt: skip
            usage.append(reply.usage)
        found = values(httpx2.get(f"{live.url}/metrics").text)
    assert found["generation_tokens_total"] == sum(u.completion_tokens for u in usage) == 72
    assert found["prompt_tokens_total"] == 2 * sum(u.prompt_tokens for u in usage)
    assert found["request_success_total,length"] == found["time_to_first_token_seconds_count"] == 6
    assert found["request_queue_time_seconds_count"] == 6
    assert found["token_k_active_bucket,6.0"] - found["token_k_active_bucket,5.0"] == 72
    assert found["slo_requests_total,ttft,met"] == found["slo_requests_total,tpot,met"] == 6
    assert found["num_requests_running"] == found["num_requests_waiting"] == found["kv_cache_usage_perc"] == 0


def test_an_offloaded_model_is_served_and_its_blocks_are_counted(checkpoint: Path, tmp_path: Path) -> None:
    pack_checkpoint(checkpoint, tmp_path / "packed")
    options = replace(OPTIONS, memory=6_000_000_000)
    ask = {"model": NAME, "prompt": "the sea", "max_tokens": 12, "temperature": 0.0}
    with live_server(checkpoint) as live:
        wanted = live.client().completions.create(**ask).choices[0].text
    with live_server(tmp_path / "packed", options=options) as live:
        assert live.client().completions.create(**ask).choices[0].text == wanted
        found = values(httpx2.get(f"{live.url}/metrics").text)
    assert found["offload_misses_total"] > 0
    assert found["offload_read_bytes_total"] > 0
    assert "offload_stall_seconds_total" in found


def test_gauges_show_what_runs(server: Live) -> None:
    stream = server.client().completions.create(
        model=NAME, prompt="the sea", max_tokens=800, stream=True, extra_body={"ignore_eos": True}
    )
    next(stream)
    found = values(httpx2.get(f"{server.url}/metrics").text)
    stream.close()
    assert found["num_requests_running"] == 1
    assert 0 < found["kv_cache_usage_perc"] < 1
