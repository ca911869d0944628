"""The in-process benchmarks over a fake backend, and the checkpoints they run on."""

import asyncio
import json

import numpy as np
import pytest
import safetensors.numpy

from bench import common, compare, shapes
from bench.drive import random_requests, run
from bench.latency import measure as measure_latency
from bench.latency import table as latency_table
from bench.throughput import measure as measure_throughput
from bench.throughput import table as throughput_table
from bench.traffic import Lengths
from novajax.core.errors import InvalidRequest
from novajax.core.fake import FakeBackend
from novajax.core.types import ModelCard
from novajax.text.tokenizer import Tokenizer

CARD = ModelCard(
    id="fake",
    directory="",
    vocab_size=1000,
    max_context_tokens=600,
    max_request_tokens=600,
    weights_digest="",
    created=0,
    end_token_ids=(5,),
)


def test_latency_rows_are_tests_by_batch():
    backend = FakeBackend(CARD, step_s=0.001)
    rows = asyncio.run(measure_latency(backend, prompt_tokens=[16], output_tokens=[8], batch_sizes=[1, 4], repetitions=3))
    assert [(row.test, row.batch, len(row.tokens_per_s)) for row in rows] == [("pp16", 1, 3), ("pp16", 4, 3), ("tg8", 1, 3), ("tg8", 4, 3)]
    assert all(row.median > 0 for row in rows)
    assert "| fake | tg8 | 4 |" in latency_table("fake", rows)


def test_throughput_counts_every_token_once():
    backend = FakeBackend(CARD)
    done = asyncio.run(measure_throughput(backend, [Lengths(10, 6)] * 9, concurrency=4, repetitions=2))
    assert len(done) == 2
    for item in done:
        assert item.output_tokens_per_s * item.duration_s == pytest.approx(54)
        assert item.prompt_tokens_per_s * item.duration_s == pytest.approx(90)
    assert "output_tokens_per_s" in throughput_table(done)


def test_a_full_queue_is_waited_for_and_a_refusal_raised():
    backend = FakeBackend(CARD, max_waiting=2)
    timed = asyncio.run(run(backend, random_requests(CARD, [Lengths(5, 3)] * 6, seed=0), concurrency=6))
    assert [item.output_tokens for item in timed] == [3] * 6
    with pytest.raises(ExceptionGroup) as caught:
        asyncio.run(run(backend, random_requests(CARD, [Lengths(599, 30)], seed=0), concurrency=1))
    assert caught.group_contains(InvalidRequest)


def test_random_requests_share_no_beginning_and_stay_in_the_vocabulary():
    first, second = random_requests(CARD, [Lengths(50, 1)] * 2, seed=1)
    assert first.prompt[:4] != second.prompt[:4]
    assert max(first.prompt + second.prompt) < CARD.vocab_size
    assert random_requests(CARD, [Lengths(50, 1)], seed=2)[0].prompt != first.prompt


def test_a_shape_is_made_once_and_sharding_changes_no_tensor(tmp_path):
    whole = shapes.make_checkpoint("tiny", tmp_path)
    assert shapes.make_checkpoint("tiny", tmp_path) == whole
    sharded = shapes.make_checkpoint("tiny", tmp_path, shard_bytes=100_000)
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    one = safetensors.numpy.load_file(whole / "model.safetensors")
    many = {name: safetensors.numpy.load_file(sharded / file)[name] for name, file in index["weight_map"].items()}
    assert len(set(index["weight_map"].values())) > 1
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in one.values())
    assert one.keys() == many.keys()
    assert all(np.array_equal(one[name], many[name]) for name in one)
    assert {name: array.shape for name, array in one.items()} == dict(shapes.tensors(shapes.SHAPES["tiny"]))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([whole.name, sharded.name])


def test_a_shapes_tokenizer_takes_any_text_and_decodes_any_id(tmp_path):
    tokenizer = Tokenizer(shapes.make_checkpoint("tiny", tmp_path))
    text = "héllo wörld\n\0 日本"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([300, 511]).split() == ["w300", "w511"]
    assert tokenizer.size == shapes.SHAPES["tiny"].vocab


def test_named_shapes_have_their_names_parameters():
    assert shapes.SHAPES["135m"].parameters == 134_515_008
    assert shapes.SHAPES["1.1b"].parameters == 1_100_048_384


def test_the_comparison_is_a_ratio_of_medians():
    def measured(*rates):
        return [{"output_tokens_per_s": rate, "decode_tokens_per_s": 2 * rate} for rate in rates]

    rounds = {1: {"ours": measured(10, 30, 20), "peer": measured(5, 5, 50)}}
    rows = compare.ratio_rows(rounds, "ours", "peer")
    assert [row[0:2] + row[4:] for row in rows] == [[1, "output_tokens_per_s", 20, 5, 4.0], [1, "decode_tokens_per_s", 40, 10, 4.0]]
    sides = compare.side_rows(rounds, {"ours": 16, "peer": 8}, parameters=1_000_000, read_rate=800e6)
    assert sides == [[1, "ours", 20, 40, 0.08, 2.0, 10.0], [1, "peer", 5, 10, 0.02, 1.0, 1.25]]


def test_a_machine_is_described_without_measuring():
    machine = common.describe_machine(probe=False)
    assert machine.cores >= 1
    assert machine.memory_read_bytes_per_s is None
    assert machine.cpu in common.machine_line(machine)
