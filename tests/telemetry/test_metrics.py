import asyncio

import pytest
from prometheus_client.parser import text_string_to_metric_families

from novajax.core.clock import ManualClock
from novajax.core.types import Stats, Timing, Usage
from novajax.telemetry.metrics import Metrics

STEMS = {
    "num_requests_running": "gauge",
    "num_requests_waiting": "gauge",
    "kv_cache_usage_perc": "gauge",
    "prefix_cache_hits": "counter",
    "prefix_cache_queries": "counter",
    "time_to_first_token_seconds": "histogram",
    "request_time_per_output_token_seconds": "histogram",
    "e2e_request_latency_seconds": "histogram",
    "request_queue_time_seconds": "histogram",
    "request_prefill_time_seconds": "histogram",
    "prompt_tokens": "counter",
    "generation_tokens": "counter",
    "speculation_drafted_tokens": "counter",
    "speculation_accepted_tokens": "counter",
    "request_success": "counter",
    "xla_compilations": "counter",
    "event_loop_lag_seconds": "histogram",
    "kv_blocks": "gauge",
    "kv_pool_identity_violations": "counter",
    "requests_aborted": "counter",
    "requests_rejected": "counter",
    "host_step_seconds": "gauge",
}


def samples(metrics: Metrics) -> dict[str, float]:
    """name{labels without model_name} -> value."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            labels = {key: value for key, value in sample.labels.items() if key != "model_name"}
            assert sample.labels["model_name"] == "m"
            name = sample.name.removeprefix("novajax_")
            found[name + ("{" + ",".join(f"{k}={v}" for k, v in sorted(labels.items())) + "}" if labels else "")] = sample.value
    return found


def test_names_are_vllms_stems():
    families = text_string_to_metric_families(Metrics("m").render().decode())
    kinds = {family.name.removeprefix("novajax_"): family.type for family in families}
    assert all(kinds[stem] == kind for stem, kind in STEMS.items())
    assert not [name for name in kinds if name.endswith("_created")]


def test_a_request_is_counted_once():
    metrics = Metrics("m")
    metrics.first_token(0.2)
    metrics.finished("stop", Usage(10, 5), Timing(0.1, 0.05, 0.8), 1.0)
    metrics.finished("error", Usage(10, 0), None, 0.5)
    found = samples(metrics)
    assert found["request_success_total{finished_reason=stop}"] == found["request_success_total{finished_reason=error}"] == 1
    assert found["request_success_total{finished_reason=length}"] == 0
    assert found["e2e_request_latency_seconds_sum"] == 1.5
    assert found["time_to_first_token_seconds_sum"] == 0.2
    assert found["request_queue_time_seconds_sum"] == 0.1
    assert found["request_prefill_time_seconds_sum"] == 0.05
    assert found["request_time_per_output_token_seconds_sum"] == pytest.approx(0.2)
    assert found["request_prompt_tokens_sum"] == 20


def test_refusals_and_aborts_by_kind():
    metrics = Metrics("m")
    metrics.rejected("overloaded")
    metrics.rejected("overloaded")
    metrics.absorb(Stats(phase="ready", aborted_queued=2, aborted_prefill=1, pid=1))
    metrics.absorb(Stats(phase="ready", aborted_decode=3, pid=2))
    found = samples(metrics)
    assert found["requests_rejected_total{reason=overloaded}"] == 2
    assert [found[f"requests_aborted_total{{phase={phase}}}"] for phase in ("queued", "prefill", "decode")] == [2, 1, 3]


def test_the_engines_state():
    metrics = Metrics("m")
    stats = Stats(
        phase="ready",
        requests_running=4,
        requests_waiting=2,
        kv_pages_free=2,
        kv_pages_cached=3,
        kv_pages_held=5,
        kv_pages_total=10,
        host_step_s=0.001,
        compilations_after_ready=1,
        pid=1,
    )
    metrics.absorb(stats)
    found = samples(metrics)
    assert (found["num_requests_running"], found["num_requests_waiting"], found["kv_cache_usage_perc"]) == (4, 2, 0.5)
    assert [found[f"kv_blocks{{state={state},tier=device}}"] for state in ("free", "cached", "held")] == [2, 3, 5]
    assert (found["host_step_seconds"], found["xla_compilations_total"]) == (0.001, 1)


def test_what_is_not_measured_is_absent():
    metrics = Metrics("m")
    metrics.absorb(Stats(phase="ready", host_step_s=0.001))
    metrics.absorb(Stats(phase="failed"))
    found = samples(metrics)
    assert "host_step_seconds" not in found
    assert found["kv_cache_usage_perc"] == 0


def test_counters_survive_a_restart_of_the_engine():
    metrics = Metrics("m")
    seen: list[float] = []
    for pid, tokens in ((1, 10), (1, 25), (1, 25), (2, 5), (2, 8), (3, 30), (3, 31)):
        metrics.absorb(Stats(phase="ready", pid=pid, generation_tokens=tokens))
        seen.append(samples(metrics)["generation_tokens_total"])
    assert seen == [10, 25, 25, 30, 33, 63, 64]


@pytest.mark.parametrize(("pid", "tokens", "total"), [(2, 4, 14), (1, 12, 12)])
def test_an_engine_that_does_not_answer_takes_nothing_back(pid: int, tokens: int, total: int):
    """Its stats are zeros without a pid; what comes after may be a new process or the same."""
    metrics = Metrics("m")
    for stats in (
        Stats(phase="ready", pid=1, generation_tokens=10),
        Stats(phase="failed"),
        Stats(phase="ready", pid=pid, generation_tokens=tokens),
    ):
        metrics.absorb(stats)
    assert samples(metrics)["generation_tokens_total"] == total


def test_registries_do_not_share_anything():
    one, two = Metrics("m"), Metrics("m")
    one.rejected("overloaded")
    assert "requests_rejected_total{reason=overloaded}" not in samples(two)


def test_the_event_loops_lag():
    metrics, clock = Metrics("m"), ManualClock()

    async def work() -> None:
        watcher = asyncio.create_task(metrics.watch_loop(clock, every_s=0.0))
        for _ in range(3):
            clock.advance(0.5)
            await asyncio.sleep(0)
        watcher.cancel()
        await asyncio.wait([watcher])

    asyncio.run(work())
    found = samples(metrics)
    assert found["event_loop_lag_seconds_count"] >= 1
    assert found["event_loop_lag_seconds_sum"] >= 0.5
