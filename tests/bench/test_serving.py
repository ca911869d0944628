"""The load generator against a real socket: what it measures, how its clients misbehave, and that it hurts nobody else."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from absl import app

from bench import common, serving
from bench.client import Sample, Target, bad_requests
from bench.figures import Slo, figures, figures_table, plot
from bench.replay import replay_closed, replay_open
from bench.traffic import Lengths, Planned, Prompts, make_plan
from novajax.core.fake import FakeBackend
from novajax.server.fake import ServedFake, fake_card
from novajax.text.fake import SIZE

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def served(tokenizer):
    backend = FakeBackend(fake_card(tokenizer), step_s=0.002)
    with ServedFake(tokenizer, backend) as server:
        yield server


def prompts() -> Prompts:
    return Prompts(seed=0, vocab=SIZE - 3, tokens_per_word=1.0)


async def closed(url: str, plan: list[Planned], concurrency: int = 4) -> list[Sample]:
    target = Target(url, "fake", chat=False, api_key=None, timeout_s=30, extra={"ignore_eos": True})
    try:
        return await replay_closed(target, plan, prompts(), concurrency=concurrency)
    finally:
        await target.close()


def test_good_requests_are_measured(served):
    plan = [Planned(index=i, at_s=0.0, lengths=Lengths(10 + i, 5)) for i in range(8)]
    samples = asyncio.run(closed(served.url, plan))
    assert [sample.outcome for sample in samples] == ["ok"] * 8
    assert [sample.prompt_tokens for sample in samples] == [10 + i for i in range(8)]
    for sample in samples:
        assert sample.output_tokens == 5
        assert sample.ttft_s is not None
        assert sample.e2e_s is not None
        assert 0 < sample.ttft_s <= sample.e2e_s
        assert sample.tpot_s is not None
    result = figures(samples, Slo(ttft_s=1e-9))
    assert (result.good, result.completed, result.goodput_share) == (8, 8, 0.0)
    assert figures(samples, Slo(ttft_s=60, tpot_s=60, e2e_s=60)).goodput_share == 1.0
    assert "8 of 8 good requests completed" in figures_table(result)


def test_every_kind_of_bad_request_is_refused_alone(served):
    kinds = len(bad_requests("fake"))
    plan = [Planned(index=i, at_s=0.0, lengths=Lengths(10, 3), bad=i if i < kinds else None) for i in range(kinds + 5)]
    samples = asyncio.run(closed(served.url, plan))
    statuses = {sample.index: (sample.outcome, sample.status) for sample in samples}
    assert all(outcome == "refused" for outcome, _ in list(statuses.values())[:kinds]), statuses
    assert [outcome for outcome, _ in list(statuses.values())[kinds:]] == ["ok"] * 5


@pytest.mark.parametrize("phase", ["body", "queued", "stream"])
def test_clients_that_vanish_leave_nothing_behind(served, phase):
    plan = [Planned(index=i, at_s=0.0, lengths=Lengths(10, 400), vanish=phase, vanish_after=2) for i in range(6)]
    samples = asyncio.run(closed(served.url, plan))
    assert [sample.outcome for sample in samples] == ["vanished"] * 6
    result = figures(samples, Slo())
    assert (result.good, result.completed) == (0, 0)

    async def gone() -> None:
        async with asyncio.timeout(20):
            while served.backend.live:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    served.call(gone())


def test_the_open_loop_keeps_its_own_time_and_counts_what_it_could_not_send(served):
    plan = make_plan([0.0] * 5 + [0.05] * 5, [Lengths(5, 100)], vanish_share=0, bad_share=0, bad_kinds=1, seed=0)

    async def run() -> list[Sample]:
        target = Target(served.url, "fake", chat=True, api_key=None, timeout_s=30, extra={"ignore_eos": True})
        words = Prompts(seed=0, vocab=None, tokens_per_word=1.0)
        try:
            return await replay_open(target, plan, words, max_open=4)
        finally:
            await target.close()

    samples = asyncio.run(run())
    assert [sample.index for sample in samples] == list(range(10))
    assert sum(sample.outcome == "ok" for sample in samples) == 4
    assert sum(sample.outcome == "unsent" for sample in samples) == 6


def test_a_server_that_is_not_there_is_broken_not_an_exception():
    samples = asyncio.run(closed("http://127.0.0.1:9", [Planned(index=0, at_s=0.0, lengths=Lengths(5, 5))]))
    assert samples[0].outcome == "broken"
    assert samples[0].detail == "ConnectError"


def test_targets_elsewhere_need_permission():
    for url in ("http://127.0.0.1:1", "http://localhost:1", "http://[::1]:1"):
        serving.require_loopback(url, False)
    for url in ("http://10.0.0.1:8000", "http://example.com", "http://127.evil.example"):
        with pytest.raises(app.UsageError):
            serving.require_loopback(url, False)
        serving.require_loopback(url, True)


def test_the_program_writes_json_markdown_and_a_plot(served, tmp_path):
    arguments = ["--requests=12", "--concurrency=3", "--prompt_tokens=6", "--output_tokens=3", "--vanish_share=0.3", "--noprobe", "--json"]
    command = [sys.executable, "-m", "bench.serving", f"--url={served.url}", f"--out={tmp_path / 'run'}", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["results"]["sent"] == 12
    assert report["results"]["completed"] == report["results"]["good"]
    assert report["settings"]["prompt_tokens"] == 6
    assert "api_key" not in report["settings"]
    assert len(report["samples"]) == 12
    assert json.loads((tmp_path / "run.json").read_text()) == report
    assert "time to first token" in (tmp_path / "run.md").read_text()
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("program", ["serving", "latency", "throughput", "compare", "soak", "shapes"])
def test_every_program_explains_itself(program):
    command = [sys.executable, "-m", f"bench.{program}", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert f"python -m bench.{program} --" in done.stdout
    assert "Traceback" not in done.stderr


def test_the_model_and_its_context_are_asked_of_the_server(served):
    async def ask() -> tuple[tuple[str, int | None], float | None]:
        async with httpx.AsyncClient(base_url=served.url) as http:
            return await serving.discover_model(http, None), await serving.measure_tokens_per_word(http, "fake")

    (model, context), tokens_per_word = asyncio.run(ask())
    assert (model, context) == ("fake", 2048)
    assert tokens_per_word is not None
    assert 3 < tokens_per_word < 6  # the tokenizer's tokens are bytes


def test_summaries_tables_and_plots_of_nothing(tmp_path):
    empty = common.summarize([])
    assert (empty.count, empty.p50) == (0, None)
    one = common.summarize([2.0])
    assert (one.p50, one.p99, one.sd) == (2.0, 2.0, None)
    assert common.summarize(range(101)).p90 == 90
    table = common.markdown_table(["a", "b"], [["x", 1.5], ["y", None]])
    assert table.splitlines() == ["| a | b |", "| --- | ---: |", "| x | 1.5 |", "| y | - |"]
    result = figures([], Slo())
    assert result.goodput_share is None
    plot([], tmp_path / "empty.png", "nothing")
    assert (tmp_path / "empty.png").exists()
