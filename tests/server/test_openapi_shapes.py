"""Replies and chunks against OpenAI's own schema, where it is present."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
import yaml

CHAT = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
TEXT = {"prompt": "abc", "max_tokens": 4}
USAGE = {"stream": True, "stream_options": {"include_usage": True}}

type Check = Callable[[Any, str], None]


def as_json_schema(value: Any) -> Any:
    """OpenAPI 3.0's `nullable: true` in JSON Schema's words."""
    if isinstance(value, list):
        return [as_json_schema(item) for item in value]
    if not isinstance(value, dict):
        return value
    converted = {key: as_json_schema(inner) for key, inner in value.items() if key != "nullable"}
    return {"anyOf": [converted, {"type": "null"}]} if value.get("nullable") is True else converted


@pytest.fixture(scope="module")
def check(shared: Path) -> Check:
    path = shared / "data/openai/openapi.yaml"
    if not path.exists():
        pytest.skip(f"OpenAI's schema is not at {path}")
    document = yaml.load(path.read_bytes(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    components = as_json_schema(document["components"]["schemas"])

    def validate(value: Any, name: str) -> None:
        jsonschema.Draft202012Validator({"$ref": f"#/components/schemas/{name}", "components": {"schemas": components}}).validate(value)

    return validate


def chunks(http: httpx.Client, path: str, body: dict[str, Any]) -> list[Any]:
    answer = http.post(path, json=body | USAGE)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    frames = answer.text.split("\n\n")
    assert frames[-2:] == ["data: [DONE]", ""]
    return [json.loads(frame.removeprefix("data: ")) for frame in frames[:-2]]


@pytest.mark.parametrize(
    "extra", [{}, {"n": 3}, {"logprobs": True, "top_logprobs": 2}, {"stop": "x"}, {"logprobs": True, "prompt_logprobs": 1}]
)
def test_chat(http: httpx.Client, check: Check, extra: dict[str, Any]):
    check(http.post("/v1/chat/completions", json=CHAT | extra).json(), "CreateChatCompletionResponse")
    for chunk in chunks(http, "/v1/chat/completions", CHAT | extra):
        check(chunk, "CreateChatCompletionStreamResponse")


@pytest.mark.parametrize("extra", [{}, {"n": 3}, {"logprobs": 2}, {"echo": True}, {"prompt": ["a", "b"]}])
def test_completions(http: httpx.Client, check: Check, extra: dict[str, Any]):
    check(http.post("/v1/completions", json=TEXT | extra).json(), "CreateCompletionResponse")
    for chunk in chunks(http, "/v1/completions", TEXT | extra):
        # OpenAI's schema is the whole reply's, whose finish_reason is never null; a chunk's is, as their clients know.
        check(
            {
                **chunk,
                "choices": [{**choice, "finish_reason": choice["finish_reason"] or "stop"} for choice in chunk["choices"]],
                "usage": chunk["usage"] or {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
            },
            "CreateCompletionResponse",
        )


def test_models(http: httpx.Client, check: Check):
    check(http.get("/v1/models").json(), "ListModelsResponse")
    check(http.get("/v1/models/fake").json(), "Model")


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/v1/chat/completions", b"{", 400),
        ("POST", "/v1/chat/completions", b'{"messages":[{"role":"user","content":"a"}],"model":"gpt-9"}', 404),
        ("GET", "/v1/nothing", b"", 404),
        ("DELETE", "/v1/models", b"", 405),
        ("GET", "/v1/models/gpt-9", b"", 404),
    ],
)
def test_errors(http: httpx.Client, check: Check, method: str, path: str, body: bytes, status: int):
    answer = http.request(method, path, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == status
    check(answer.json(), "ErrorResponse")
