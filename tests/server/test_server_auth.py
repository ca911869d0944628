"""Deny by default: every route goes through the guard, keys are compared whole, and nothing is open beyond loopback."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from litestar.routes import HTTPRoute

from novajax.core.errors import ConfigError
from novajax.core.fake import FakeBackend
from novajax.server.app import create_app
from novajax.server.fake import ServedFake, fake_card
from novajax.server.settings import ServerSettings, digest, is_loopback, read_keys, refuse_open_bind
from novajax.text.tokenizer import Tokenizer

KEY = "k" * 24
OTHER = "o" * 24
PUBLIC = {"/", "/health", "/ready"}


@pytest.fixture(scope="module")
def locked(tokenizer: Tokenizer) -> Iterator[ServedFake]:
    with ServedFake(tokenizer, settings=ServerSettings(port=0, key_digests=(digest(KEY), digest(OTHER)))) as running:
        yield running


def routes(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    app = create_app(FakeBackend(fake_card(tokenizer)), tokenizer, None, ServerSettings())
    return sorted((method, route.path) for route in app.routes if isinstance(route, HTTPRoute) for method in route.route_handler_map)


def test_every_route_but_three_needs_a_key(locked: ServedFake, tokenizer: Tokenizer):
    walked = routes(tokenizer)
    assert {path for _, path in walked} > PUBLIC | {"/v1/chat/completions", "/v1/completions", "/metrics", "/version", "/tokenize"}
    with httpx.Client(base_url=locked.url) as client:
        for method, path in walked:
            answer = client.request(method, path.replace("{model_id:path}", "x"))
            public = path in PUBLIC and method != "OPTIONS"
            assert (answer.status_code == 401) != public, (method, path, answer.status_code)
            if not public:
                assert answer.json()["error"]["code"] == "invalid_api_key"
                assert answer.headers["www-authenticate"] == "Bearer"


def test_no_route_of_litestar_s_own(locked: ServedFake):
    with httpx.Client(base_url=locked.url, headers={"x-api-key": KEY}) as client:
        for path in ("/schema", "/schema/openapi.json", "/docs", "/redoc", "/admin", "/static"):
            assert client.get(path).status_code == 404


@pytest.mark.parametrize("headers", [{"authorization": f"Bearer {KEY}"}, {"x-api-key": OTHER}, {"authorization": f"bearer   {OTHER}"}])
def test_a_key_opens(locked: ServedFake, headers: dict[str, str]):
    assert httpx.get(locked.url + "/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("authorization", "")],
        [("authorization", "Bearer")],
        [("authorization", f"Bearer {KEY[:-1]}")],
        [("authorization", f"Bearer {KEY}x")],
        [("authorization", f"Basic {KEY}")],
        [("authorization", KEY)],
        [("authorization", f"Bearer {KEY}"), ("authorization", f"Bearer {KEY}")],
        [("authorization", f"Bearer {KEY}"), ("x-api-key", OTHER)],
        [("x-api-key", "\xe9" * 24)],
        [("x-api-key", "a" * 40_000)],
        [("cookie", f"api_key={KEY}")],
    ],
)
def test_anything_else_does_not(locked: ServedFake, headers: list[tuple[str, str]]):
    encoded = [(name.encode(), value.encode("latin-1")) for name, value in headers]
    answer = httpx.get(locked.url + "/v1/models", headers=encoded)
    assert answer.status_code == 401
    assert KEY not in answer.text


@pytest.mark.parametrize("query", [f"api_key={KEY}", f"key={KEY}", f"token={KEY}", f"authorization=Bearer%20{KEY}"])
def test_a_key_in_the_url_is_no_key(locked: ServedFake, query: str):
    assert httpx.get(f"{locked.url}/v1/models?{query}").status_code == 401


def test_metrics_open_only_when_told_so(tokenizer: Tokenizer):
    with ServedFake(tokenizer, settings=ServerSettings(port=0, key_digests=(digest(KEY),), metrics_open=True)) as running:
        assert httpx.get(running.url + "/metrics").status_code == 200
        assert httpx.get(running.url + "/v1/models").status_code == 401


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("localhost:81", 200),
        ("127.0.0.1", 200),
        ("[::1]:8000", 200),
        ("evil.example", 403),
        ("127.0.0.1.evil.example", 403),
    ],
)
def test_without_keys_only_this_machine_s_names_are_answered(served: ServedFake, host: str, status: int):
    assert httpx.get(served.url + "/v1/models", headers={"host": host}).status_code == status


def test_origins_get_no_permission(served: ServedFake):
    headers = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    for answer in (httpx.get(served.url + "/v1/models", headers=headers), httpx.options(served.url + "/v1/models", headers=headers)):
        assert not [name for name in answer.headers if name.startswith("access-control")]


def test_prefix_pages_are_shared_only_within_one_key_and_salt(tokenizer: Tokenizer):
    backend, salts = FakeBackend(fake_card(tokenizer)), []
    submit = backend.submit
    backend.submit = lambda request: (salts.append(request.cache_salt), submit(request))[1]  # type: ignore[method-assign]
    with ServedFake(tokenizer, backend, ServerSettings(port=0, key_digests=(digest(KEY), digest(OTHER)))) as running:
        for key, salt in itertools.product((KEY, OTHER), (None, "a", "../../b\r\n" + "c" * 200)):
            body = {"prompt": "a", "max_tokens": 1} | ({"cache_salt": salt} if salt else {})
            assert httpx.post(running.url + "/v1/completions", json=body, headers={"x-api-key": key}).status_code == 200
    assert len(set(salts)) == 6
    assert all(len(salt) == 32 and salt.isalnum() for salt in salts)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org", ""])
def test_a_bind_beyond_loopback_needs_a_key(host: str):
    with pytest.raises(ConfigError, match="key"):
        refuse_open_bind(ServerSettings(host=host))
    refuse_open_bind(ServerSettings(host=host, key_digests=(digest(KEY),)))
    with pytest.raises(ConfigError, match="metrics"):
        refuse_open_bind(ServerSettings(host=host, key_digests=(digest(KEY),), metrics_open=True))


def test_loopback():
    assert all(map(is_loopback, ("localhost", "LocalHost", "127.0.0.1", "127.8.8.8", "::1", "[::1]")))
    assert not any(map(is_loopback, ("0.0.0.0", "localhost.evil.example", "127.0.0.1.evil.example", "2130706433", "")))


def test_key_files(tmp_path: Path):
    path = tmp_path / "keys"
    path.write_text(f"# ops\n{KEY}\n\n  {OTHER}  \n{KEY}\n")
    assert read_keys(path) == (digest(KEY), digest(OTHER))
    assert KEY not in repr(ServerSettings(key_digests=read_keys(path)))
    for text, message in (("", "no key"), ("short\n", ":1:"), (f"{KEY}\nwith space in the key\n", ":2:"), ("ключ-ключ-ключ-ключ\n", ":1:")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_keys(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_keys(tmp_path / "none")
