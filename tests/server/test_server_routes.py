"""What the routes answer beyond OpenAI's contract: refusals by name, tokenizing, health, request ids, the page."""

import base64
import hashlib
import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from novajax.core.fake import FakeBackend
from novajax.server.fake import ServedFake, fake_card
from novajax.server.settings import ServerSettings
from novajax.text.tokenizer import Tokenizer

CHAT = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("tool_choice", "auto"),
        ("functions", [{}]),
        ("response_format", {"type": "json_object"}),
        ("guided_json", {"type": "object"}),
        ("structured_outputs", {"regex": "a"}),
        ("regex", "a+"),
        ("grammar", "root ::= x"),
        ("best_of", 2),
        ("suffix", "x"),
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "a"}),
        ("truncate_prompt_tokens", 5),
    ],
)
def test_known_features_that_are_not_there_are_refused_by_name(http: httpx.Client, field: str, value: Any):
    error = http.post("/v1/chat/completions", json=CHAT | {field: value}).json()["error"]
    assert (error["code"], error["param"]) == ("unsupported_parameter", field)


@pytest.mark.parametrize(
    ("content", "param"),
    [
        ([{"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}], "messages[0].content[0]"),
        ([{"type": "text", "text": "a"}, {"type": "input_audio"}], "messages[0].content[1]"),
    ],
)
def test_parts_that_are_no_text(http: httpx.Client, content: Any, param: str):
    error = http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": content}]}).json()["error"]
    assert (error["code"], error["param"]) == ("unsupported_parameter", param)


@pytest.mark.parametrize(
    "extra",
    [
        {"tools": []},
        {"tool_choice": "none"},
        {"response_format": {"type": "text"}},
        {"modalities": ["text"]},
        {"best_of": 1},
        {"n": None, "temperature": None, "stop": None, "logit_bias": None, "max_completion_tokens": None},
        {"user": "u", "store": False, "metadata": {"a": "b"}, "service_tier": "auto", "an_unknown_field": {"x": [1]}},
        {"priority": -1},
        {"priority": "high"},
        {"quantization": "auto", "quality_preference": "quality"},
        {"quantization": "fp16", "quality_preference": "speed"},
        {"top_k": -1, "min_p": 0.5, "repetition_penalty": 1.2, "min_tokens": 1, "stop_token_ids": [5], "ignore_eos": True},
        {"logit_bias": {"5": -100}, "seed": 2**63 - 1, "skip_special_tokens": False, "add_special_tokens": True},
        {"messages": [{"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]},
        {
            "messages": [
                {"role": "user", "content": "a", "name": "n"},
                {"role": "assistant", "content": "b"},
                {"role": "user", "content": ""},
            ]
        },
    ],
)
def test_what_asks_for_nothing_special_passes(http: httpx.Client, extra: dict[str, Any]):
    answer = http.post("/v1/chat/completions", json=CHAT | extra)
    assert answer.status_code == 200, answer.text


def test_a_precision_is_chosen_among_those_that_are_loaded(tokenizer: Tokenizer):
    backend, seen = FakeBackend(fake_card(tokenizer, variants=("int8", "float"))), []
    submit = backend.submit
    backend.submit = lambda request: (seen.append(request.variant), submit(request))[1]  # type: ignore[method-assign]
    with ServedFake(tokenizer, backend) as running:
        for extra in (
            {"quantization": "int8"},
            {"quantization": "fp32"},
            {"quality_preference": "quality"},
            {"quality_preference": "speed"},
        ):
            assert httpx.post(running.url + "/v1/chat/completions", json=CHAT | extra).status_code == 200
        error = httpx.post(running.url + "/v1/completions", json={"prompt": "a", "quantization": "int4"}).json()["error"]
    assert seen == ["int8", "float", "float", ""]
    assert (error["param"], error["message"]) == ("quantization", "quantization 'int4' is not loaded; loaded: int8, float")


def test_continuing_a_message(http: httpx.Client):
    """The prompt ends inside the last message, so the counting model continues its last letter."""
    messages = [{"role": "user", "content": "count"}, {"role": "assistant", "content": "abc"}]
    body = {"messages": messages, "max_tokens": 3, "continue_final_message": True, "add_generation_prompt": False}
    assert http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"] == "def"
    assert http.post("/v1/chat/completions", json=body | {"add_generation_prompt": True}).status_code == 400


def test_the_model_s_own_defaults_hold_unless_given(tokenizer: Tokenizer):
    card = fake_card(tokenizer, default_sampling={"temperature": 0.6, "top_k": 20, "something_else": 1})
    backend, seen = FakeBackend(card), []
    submit = backend.submit
    backend.submit = lambda request: (seen.append(request.sampling), submit(request))[1]  # type: ignore[method-assign]
    with ServedFake(tokenizer, backend) as running:
        for extra in ({}, {"temperature": 0, "top_k": -1}, {"temperature": 1e-45}):
            assert httpx.post(running.url + "/v1/chat/completions", json=CHAT | extra).status_code == 200
    assert [(sampling.temperature, sampling.top_k) for sampling in seen] == [(0.6, 20), (0.0, 0), (0.0, 20)]


def test_served_names(tokenizer: Tokenizer):
    with ServedFake(tokenizer, settings=ServerSettings(port=0, model_names=("small", "org/small"))) as running:
        assert [entry["id"] for entry in httpx.get(running.url + "/v1/models").json()["data"]] == ["small", "org/small"]
        assert httpx.get(running.url + "/v1/models/org/small").json()["id"] == "org/small"
        for name, status, said in (("org/small", 200, "org/small"), (None, 200, "small"), ("fake", 404, None)):
            answer = httpx.post(running.url + "/v1/chat/completions", json=CHAT | {"model": name})
            assert (answer.status_code, answer.json().get("model")) == (status, said)


def test_tokenize_and_back(http: httpx.Client):
    answer = http.post("/tokenize", json={"prompt": "héé", "return_token_strs": True}).json()
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"]) == 5
    assert answer["max_model_len"] == 2048
    assert http.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": "héé"}
    chat = http.post("/tokenize", json={"messages": CHAT["messages"]}).json()
    text = http.post("/detokenize", json={"tokens": chat["tokens"]}).json()["prompt"]
    assert text == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert http.post("/tokenize", json={}).status_code == 400
    assert http.post("/detokenize", json={"tokens": [99999]}).status_code == 400


def test_real_tokenizers(shared: Path):
    for name in ("models/stories260k", "tokenizers/qwen2.5"):
        tokenizer = Tokenizer(shared / name)
        with ServedFake(tokenizer, FakeBackend(fake_card(tokenizer))) as running:
            text = "Once upon a time, Ünïcode 🦊 said <|im_end|>."
            ids = httpx.post(running.url + "/tokenize", json={"prompt": text, "add_special_tokens": False}).json()["tokens"]
            assert httpx.post(running.url + "/detokenize", json={"tokens": ids}).json()["prompt"].strip() == text
            made = httpx.post(running.url + "/v1/completions", json={"prompt": ids, "max_tokens": 2, "echo": True}).json()
            assert text in made["choices"][0]["text"]


def test_health_and_ready_follow_the_engine(tokenizer: Tokenizer):
    with ServedFake(tokenizer) as running, httpx.Client(base_url=running.url) as client:
        for phase, health, ready in (("compiling", 200, 503), ("ready", 200, 200), ("draining", 200, 503), ("failed", 503, 503)):
            running.backend.phase = phase  # type: ignore[assignment]
            answer = client.get("/health")
            assert (answer.status_code, client.get("/ready").status_code) == (health, ready)
            assert answer.json()["components"]["engine"]["status"] == phase
            chat = client.post("/v1/chat/completions", json=CHAT)
            assert chat.status_code == (200 if phase == "ready" else 503)
            assert ("retry-after" in chat.headers) == (phase != "ready")


def test_metrics_and_version(http: httpx.Client):
    http.post("/v1/chat/completions", json=CHAT)
    http.post("/v1/chat/completions", json=CHAT | {"n": 99})
    text = http.get("/metrics").text
    values = dict(re.findall(r"^(novajax_\S+?)\{[^}]*\} (\S+)$", text, re.MULTILINE))
    assert float(values["novajax_time_to_first_token_seconds_count"]) >= 1
    assert re.search(r'novajax_requests_rejected_total\{.*reason="invalid_request".*\} [1-9]', text)
    assert re.search(r'novajax_request_success_total\{finished_reason="length".*\} [1-9]', text)
    assert float(values["novajax_event_loop_lag_seconds_count"]) >= 0
    assert http.get("/version").json()["version"]


@pytest.mark.parametrize("name", ["abc", "trace-1.2_x", "a" * 64])
def test_a_harmless_request_id_comes_back(http: httpx.Client, name: str):
    assert http.get("/health", headers={"x-request-id": name}).headers["x-request-id"] == name


@pytest.mark.parametrize("name", ["", "../x", "10.0.0.1:99", "a b", "a" * 65, "..", "é", "<script>"])
def test_any_other_does_not(http: httpx.Client, name: str):
    answer = http.get("/health", headers=[(b"x-request-id", name.encode())])
    assert answer.headers["x-request-id"].startswith("req-")


def test_the_page_is_alone_and_guarded_by_its_policy(http: httpx.Client):
    answer = http.get("/")
    assert answer.headers["content-type"].startswith("text/html")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for kind, text in re.findall(r"<(script|style)>(.*?)</\1>", answer.text, re.DOTALL):
        hashed = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert re.search(rf"{kind}-src [^;]*'sha256-{re.escape(hashed)}'", policy)
    outside = re.sub(r"xmlns='http://www\.w3\.org/2000/svg'", "", answer.text)
    assert not re.search(r"""(src|href)=["']?(https?:)?//|@import|url\(http""", outside)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|\son[a-z]+=\"", answer.text)
    again = http.get("/", headers={"if-none-match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
