"""An engine with quantized weights answers as long as the float32 one, and the same again."""

from novajax.core.types import SamplingParams

NANO = "tests/data/nano/llama2"
SMALL = {"max_rows": 2, "max_context_tokens": 64, "chunk_tokens": 16, "prefix_cache": False}


def test_int8_is_served(open_served):
    plain, small = open_served(model=NANO, **SMALL), open_served(model=NANO, quantization="int8", **SMALL)
    prompts = [tuple(range(3, 13)), (5, 9, 17)]
    asked = [SamplingParams(max_tokens=12, temperature=0.0)] * 2
    wanted, got = plain.ask(prompts, asked), small.ask(prompts, asked)
    assert [len(answer.tokens) for answer in got] == [len(answer.tokens) for answer in wanted]
    assert [answer.tokens for answer in small.ask(prompts, asked)] == [answer.tokens for answer in got]
