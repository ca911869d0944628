"""The official client against a real socket: it must work unchanged."""

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from novajax.core.fake import FakeBackend
from novajax.server.fake import ServedFake, fake_card
from novajax.text.tokenizer import Tokenizer

HELLO: Any = [{"role": "user", "content": "hello"}]


@pytest.fixture
def client(served: ServedFake) -> Iterator[Any]:
    with openai.OpenAI(base_url=served.url + "/v1", api_key="any", max_retries=0) as made:
        yield made


def test_chat(client: Any):
    answer = client.chat.completions.create(model="fake", messages=HELLO, max_tokens=5)
    choice = answer.choices[0]
    assert choice.finish_reason == "length"
    assert choice.message.role == "assistant"
    assert len(choice.message.content) == 5
    assert answer.usage.completion_tokens == 5
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 5
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    assert answer.id.startswith("chatcmpl-")
    assert answer.system_fingerprint


def test_chat_streams_the_same_text(client: Any):
    whole = client.chat.completions.create(model="fake", messages=HELLO, max_tokens=9).choices[0].message.content
    chunks = list(
        client.chat.completions.create(model="fake", messages=HELLO, max_tokens=9, stream=True, stream_options={"include_usage": True})
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 9
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_continuous_usage(client: Any):
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = client.completions.create(model="fake", prompt="a", max_tokens=4, stream=True, stream_options=options)
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 4


def test_completion(client: Any):
    answer = client.completions.create(model="fake", prompt="abc", max_tokens=3)
    assert answer.choices[0].text == "def"
    assert answer.usage.prompt_tokens == 3


def test_completion_streams(client: Any):
    chunks = list(client.completions.create(model="fake", prompt="abc", max_tokens=3, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "def"


@pytest.mark.parametrize("prompt", ["abc", [64, 65, 66], ["abc", "x"], [[64, 65, 66], [87]]])
def test_every_form_of_prompt(client: Any, prompt):
    answer = client.completions.create(model="fake", prompt=prompt, max_tokens=2)
    texts = [choice.text for choice in answer.choices]
    assert texts == (["de", "yz"] if len(prompt) == 2 else ["de"])


def test_n_numbers_the_choices_of_every_prompt(client: Any):
    answer = client.completions.create(model="fake", prompt=["a", "b"], max_tokens=1, n=3)
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert [choice.text for choice in answer.choices] == ["b"] * 3 + ["c"] * 3
    assert answer.usage.prompt_tokens == 2
    assert answer.usage.completion_tokens == 6


def test_n_streams(client: Any):
    texts = ["", ""]
    for chunk in client.chat.completions.create(model="fake", messages=HELLO, max_tokens=4, n=2, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts[0] == texts[1]
    assert len(texts[0]) == 4


def test_stop(client: Any):
    answer = client.completions.create(model="fake", prompt="a", max_tokens=20, stop=["de", "zz"])
    assert answer.choices[0].text == "bc"
    assert answer.choices[0].finish_reason == "stop"
    kept = client.completions.create(model="fake", prompt="a", max_tokens=20, stop="de", extra_body={"include_stop_str_in_output": True})
    assert kept.choices[0].text == "bcde"


def test_stop_token_ids_and_ignore_eos(client: Any):
    answer = client.completions.create(model="fake", prompt="a", max_tokens=20, extra_body={"stop_token_ids": [67]})
    assert answer.choices[0].text == "bc"
    assert answer.choices[0].stop_reason == 67
    ended = client.completions.create(model="fake", prompt=[256], max_tokens=9)
    assert ended.usage.completion_tokens < 9
    assert ended.choices[0].finish_reason == "stop"
    going = client.completions.create(model="fake", prompt=[256], max_tokens=9, extra_body={"ignore_eos": True})
    assert going.usage.completion_tokens == 9


def test_chat_logprobs(client: Any):
    answer = client.chat.completions.create(model="fake", messages=HELLO, max_tokens=3, logprobs=True, top_logprobs=2)
    content = answer.choices[0].logprobs.content
    assert [entry.logprob for entry in content] == [-0.5] * 3
    assert "".join(entry.token for entry in content) == answer.choices[0].message.content
    assert all(len(entry.top_logprobs) == 2 and entry.top_logprobs[0].token == entry.token for entry in content)
    assert bytes(byte for entry in content for byte in entry.bytes).decode() == answer.choices[0].message.content
    streamed = client.chat.completions.create(model="fake", messages=HELLO, max_tokens=3, logprobs=True, top_logprobs=2, stream=True)
    pieces = [entry for chunk in streamed if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content]
    assert pieces == content


def test_completion_logprobs(client: Any):
    logprobs = client.completions.create(model="fake", prompt="abc", max_tokens=3, logprobs=1).choices[0].logprobs
    assert logprobs.tokens == ["d", "e", "f"]
    assert logprobs.token_logprobs == [-0.5] * 3
    assert logprobs.top_logprobs == [{"d": -0.5}, {"e": -0.5}, {"f": -0.5}]
    assert logprobs.text_offset == [0, 1, 2]


@pytest.mark.parametrize("stream", [False, True])
def test_scoring_a_prompt(client: Any, stream: bool):
    """What evaluation harnesses do: echo with logprobs, and no new token or one."""
    for new in (0, 1):
        made = client.completions.create(model="fake", prompt=[64, 65, 66], max_tokens=new, echo=True, logprobs=1, stream=stream)
        choices = [chunk.choices[0] for chunk in made] if stream else [made.choices[0]]
        scored = [choice.logprobs for choice in choices if choice.logprobs]
        assert "".join(choice.text for choice in choices) == "abcd"[: 3 + new]
        assert [token for part in scored for token in part.tokens] == list("abcd"[: 3 + new])
        assert [value for part in scored for value in part.token_logprobs] == [None, -1.0, -1.0, -0.5][: 3 + new]
        assert [at for part in scored for at in part.text_offset] == [0, 1, 2, 3][: 3 + new]
        assert scored[0].top_logprobs[:3] == [None, {"b": -1.0}, {"c": -1.0}]


def test_prompt_logprobs(client: Any):
    answer = client.completions.create(model="fake", prompt="ab", max_tokens=1, extra_body={"prompt_logprobs": 1})
    first, second = answer.choices[0].prompt_logprobs
    assert first is None
    assert second == {"65": {"logprob": -1.0, "rank": 1, "decoded_token": "b"}}


def test_timings(client: Any):
    answer = client.chat.completions.create(model="fake", messages=HELLO, max_tokens=3)
    assert set(answer.timings) == {"queued_s", "prefill_s", "decode_s", "tokens_per_s"}


def test_models(client: Any):
    listed = client.models.list().data
    assert [model.id for model in listed] == ["fake"]
    assert client.models.retrieve("fake").created == 1_700_000_000
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("org/other")
    assert caught.value.code == "model_not_found"


def test_errors_have_openai_s_shape(client: Any):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="fake", messages=HELLO, n=65)
    assert caught.value.param == "n"
    assert caught.value.code == "invalid_request"
    assert caught.value.type == "invalid_request_error"
    assert caught.value.request_id
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-4", messages=HELLO)


def test_a_failure_in_mid_stream_reaches_the_reader(tokenizer: Tokenizer):
    with ServedFake(tokenizer, FakeBackend(fake_card(tokenizer), fail_on=70)) as failing:
        client: Any = openai.OpenAI(base_url=failing.url + "/v1", api_key="any", max_retries=0)
        with pytest.raises(openai.APIError, match="told to fail"):
            list(client.completions.create(model="fake", prompt="g", max_tokens=3, stream=True))
        with pytest.raises(openai.BadRequestError, match="told to fail"):
            client.completions.create(model="fake", prompt="g", max_tokens=3)
        assert client.completions.create(model="fake", prompt="a", max_tokens=3).choices[0].text == "bcd"


def test_the_client_retries_when_told_to(tokenizer: Tokenizer):
    """A full queue answers 429 with Retry-After; the client's second try finds it empty."""
    with ServedFake(tokenizer, FakeBackend(fake_card(tokenizer), step_s=0.05, max_waiting=1)) as small:
        url, seen = small.url + "/v1", []

        async def both() -> list[str]:
            watched = openai.DefaultAsyncHttpxClient(event_hooks={"response": [note]})
            async with openai.AsyncOpenAI(base_url=url, api_key="any", http_client=watched) as client:
                tasks = [client.completions.create(model="fake", prompt=first, max_tokens=6) for first in "ab"]
                return [answer.choices[0].text for answer in await asyncio.gather(*tasks)]

        async def note(response: Any) -> None:
            seen.append((response.status_code, response.headers.get("retry-after")))

        assert asyncio.run(both()) == ["bcdefg", "cdefgh"]
        assert (429, "1") in seen


def test_async_client(served: ServedFake):
    async def use() -> None:
        async with openai.AsyncOpenAI(base_url=served.url + "/v1", api_key="any") as client:
            answer = await client.chat.completions.create(model="fake", messages=HELLO, max_tokens=4)
            stream = await client.chat.completions.create(model="fake", messages=HELLO, max_tokens=4, stream=True)
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            assert text == answer.choices[0].message.content
            assert [model.id async for model in client.models.list()] == ["fake"]

    asyncio.run(use())


def test_seeds_reach_the_backend(tokenizer: Tokenizer):
    backend, seeds = FakeBackend(fake_card(tokenizer)), []
    submit = backend.submit
    backend.submit = lambda request: (seeds.append(request.sampling.seed), submit(request))[1]  # type: ignore[method-assign]
    with ServedFake(tokenizer, backend) as running:
        client = openai.OpenAI(base_url=running.url + "/v1", api_key="any")
        client.chat.completions.create(model="fake", messages=HELLO, max_tokens=1, seed=7, n=2)
    assert sorted(seeds) == [7, 8]
