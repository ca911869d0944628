"""The Python API on the bundled model."""

from pathlib import Path

import pytest

from novajax import LLM, SamplingParams
from novajax.core.errors import ConfigError, ContextTooLong, InvalidRequest, WeightsError

MODEL = str(Path(__file__).parents[2] / "checkpoints" / "nova-small")


@pytest.fixture(scope="module")
def llm():
    with LLM(MODEL, max_rows=4, max_context_tokens=256) as opened:
        yield opened


def test_prompts_come_back_in_order(llm: LLM):
    greedy = SamplingParams(temperature=0.0, max_tokens=8)
    prompts = ["Once upon a time", "The sun", "One day, a fox", "A", "In the morning", "My friend"]
    together = llm.generate(prompts, greedy)
    assert [output.text for output in together] == [llm.generate(prompt, greedy)[0].text for prompt in prompts]
    ids = llm.tokenizer.encode(prompts[2])
    assert llm.generate(ids, greedy)[0].tokens == together[2].tokens


def test_chat_alternatives_and_seeds(llm: LLM):
    sampling = SamplingParams(n=3, seed=4, max_tokens=12, temperature=1.0)
    conversation = [{"role": "user", "content": "What is 12 + 30?"}]
    first, second = llm.chat(conversation, sampling), llm.chat(conversation, sampling)
    assert [output.index for output in first] == [0, 1, 2]
    assert [output.tokens for output in first] == [output.tokens for output in second]
    assert [output.seed for output in first] == [4, 5, 6]


def test_own_sampling_for_each_prompt_and_the_models_defaults(llm: LLM):
    outputs = llm.generate(["A", "B"], [SamplingParams(max_tokens=3, ignore_eos=True), SamplingParams(max_tokens=5, ignore_eos=True)])
    assert [len(output.tokens) for output in outputs] == [3, 5]
    assert llm.generate("The sun")[0].finish_reason in ("stop", "length")


def test_mistakes_are_named(llm: LLM):
    with pytest.raises(ContextTooLong, match="256"):
        llm.generate("a", SamplingParams(max_tokens=1000))
    with pytest.raises(InvalidRequest, match="empty"):
        llm.generate([[]])
    with pytest.raises(InvalidRequest, match="2 sampling"):
        llm.generate(["a"], [SamplingParams(), SamplingParams()])
    assert llm.generate("a", SamplingParams(max_tokens=1))[0].usage.completion_tokens <= 1
    with pytest.raises(ConfigError, match="rows"):
        LLM(MODEL, rows=3)
    with pytest.raises(ConfigError, match="AXIS=SIZE"):
        LLM(MODEL, mesh="tensors=2")
    with pytest.raises(WeightsError, match="nowhere"):
        LLM("/nowhere")
