"""Bad bodies and fields, row by row: each may only fail itself. The common expectation is `unharmed`."""

import json
import threading
from typing import Any

import pytest
from abuse_world import CHAT, HELLO, TEXT, Target, check_error, check_finite, unharmed

INF, NAN = float("inf"), float("nan")


def chat(**fields: Any) -> dict[str, Any]:
    return {"messages": HELLO, "max_tokens": 2} | fields


def text(**fields: Any) -> dict[str, Any]:
    return {"prompt": "hello", "max_tokens": 2} | fields


def nested(depth: int) -> bytes:
    return b'{"messages":' + b"[" * depth + b"]" * depth + b"}"


ROWS: dict[str, list[tuple[str, Any, set[int]]]] = {
    "1 broken JSON": [
        (path, body, {400})
        for path in (CHAT, TEXT, "/tokenize", "/detokenize")
        for body in (
            b"",
            b"{",
            b'{"prompt": "a"',
            b"\xff\xfe{\x00}\x00",
            b"\x00",
            b'{"prompt": "a\x00b"}',
            b'{"prompt": "\xff"}',
            b'{"prompt": "\\ud800"}',
            b'{"messages":[{"role":"user","content":"\\udfff\\ud800"}]}',
            b"null",
            b"[]",
            b'"text"',
            b"{} {}",
            b"NaN",
        )
    ],
    "2 nesting": [(path, nested(depth), {400}) for path in (CHAT, TEXT) for depth in (1_000, 100_000)]
    + [(CHAT, b'{"messages":[{"role":"user","content":"a"}],"metadata":' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001, {400})],
    "9 n and best_of": [
        (path, make(**{field: value}), {400})
        for path, make in ((CHAT, chat), (TEXT, text))
        for field in ("n", "best_of")
        for value in (0, -1, 1.5, True, "2", 65, 16384, 10**30)
        if (field, value) != ("best_of", True)
    ]
    + [(TEXT, text(prompt=["a"] * 40, n=64), {400, 429}), (TEXT, text(prompt=["a"] * 5000), {400})],
    "10 max_tokens": [
        (path, make(max_tokens=value), {400})
        for path, make in ((CHAT, chat), (TEXT, text))
        for value in (0, -1, 2**31, 2**63, 10**30, 1.5, "9")
    ]
    + [(CHAT, chat(max_completion_tokens=value), {400}) for value in (0, -1, 2**31)],
    "12 logprobs and logit_bias": [
        *((CHAT, chat(logprobs=True, top_logprobs=value), {400}) for value in (-1, 21, 50_000, 10**6)),
        (CHAT, chat(top_logprobs=3), {400}),
        (CHAT, chat(logprobs=5), {400}),
        *((TEXT, text(logprobs=value), {400}) for value in (-1, 21, 50_000, 10**6, True)),
        *((TEXT, text(prompt_logprobs=value), {400}) for value in (-1, 21, 10**6)),
        *(
            (TEXT, text(logit_bias=value), {400})
            for value in ({"-1": 1}, {str(2**30): 1}, {"5": INF}, {"5": 1e9}, {"a": 1}, {"5": "x"}, [1])
        ),
        (TEXT, text(logit_bias={str(i): 1 for i in range(2000)}), {400}),
        (TEXT, text(logit_bias={str(i): 1 for i in range(500_000)}), {400, 413}),
        *((TEXT, text(stop_token_ids=value), {400}) for value in ([-1], [2**30], [1.5], ["a"], [0] * 65)),
    ],
    "13 stop": [
        (path, make(stop=value), {400})
        for path, make in ((CHAT, chat), (TEXT, text))
        for value in (["a"] * 5, ["x"] * 100_000, "", [""], ["a", ""], "x" * 10**6, "é" * 200, [1], {"a": 1})
    ],
    "14 seed, user, cache_salt": [
        (path, make(**{field: value}), {400})
        for path, make in ((CHAT, chat), (TEXT, text))
        for field, value in (
            ("seed", 2**64),
            ("seed", 2**63),
            ("seed", -1),
            ("seed", 1.5),
            ("user", "u" * 10**6),
            ("cache_salt", "s" * 10**6),
            ("cache_salt", ""),
            ("priority", "urgent"),
            ("priority", 2**40),
            ("model", "m" * 10**6),
        )
    ],
    "15 token ids": [
        (TEXT, text(prompt=value), {400})
        for value in (
            [-1],
            [2**30],
            [2**31],
            [2**63],
            [10**30],
            [1.5],
            [1, "a"],
            ["a", 1],
            [[1], "a"],
            [[[1]]],
            [],
            [[]],
            [[1], []],
            "",
            ["a", ""],
            [None],
            [True],
            {},
        )
    ]
    + [("/detokenize", {"tokens": value}, {400}) for value in ([-1], [2**30], [1.5], ["a"], "abc", None)],
    "18 chat_template_kwargs": [
        (CHAT, chat(chat_template_kwargs=value), {400})
        for value in (
            {"tokenize": True},
            {"messages": []},
            {"__class__": 1},
            {"bos_token": "x"},
            {"raise_exception": 1},
            {"tools": []},
            {"add_generation_prompt": False},
            {"unknown": 1},
            [1],
        )
    ],
    "19 chat_template": [
        (path, {"messages": HELLO, "chat_template": template}, {403})
        for path in (CHAT, "/tokenize")
        for template in (
            "{% for i in range(10**9) %}{% endfor %}",
            "{{ 'a' * 400000000 }}",
            "{{ lipsum.__globals__['os'].popen('id').read() }}",
            "{{ cycler.__init__.__globals__ }}",
            "{{ messages }}",
            "",
        )
    ],
    "20 messages": [
        (CHAT, {"messages": value, "max_tokens": 2}, {400})
        for value in (
            [],
            None,
            "hello",
            [None],
            HELLO * 100_000,
            [{"role": "root", "content": "a"}],
            [{"role": "user"}],
            [{"role": "user", "content": None}],
            [{"role": "user", "content": 5}],
            [{"role": "user", "content": []}],
            [{"role": "user", "content": [{"type": "text", "text": "a"}, "b"]}],
            [{"role": "user", "content": [{"type": "text"}]}],
            [{"role": "user", "content": [{"type": "video", "text": "a"}]}],
            [{"role": "assistant", "content": None, "tool_calls": [{"type": "function"}]}],
            [{"role": "tool", "content": "a"}],
            [{"content": "a"}],
        )
    ],
}


@pytest.mark.parametrize("row", ROWS)
def test_row(target: Target, row: str):
    with unharmed(target):
        for path, body, statuses in ROWS[row]:
            check_error(target.post(path, body), statuses)


def test_row_3_the_last_of_duplicate_keys_is_the_one_that_is_checked(target: Target):
    with unharmed(target):
        answer = target.post(TEXT, b'{"prompt":"a","max_tokens":1,"n":1,"n":3}')
        assert len(answer.json()["choices"]) == 3
        check_error(target.post(TEXT, b'{"prompt":"a","max_tokens":1,"n":1,"n":65}'), {400})


def test_row_4_content_types(target: Target):
    body = json.dumps(text()).encode()
    with unharmed(target):
        for kind in ("text/plain", "", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/jsonx", "*/*"):
            check_error(target.post(TEXT, body, **{"content-type": kind}), {415})
        assert target.post(TEXT, body, **{"content-type": "Application/JSON; charset=utf-8"}).status_code == 200


def test_row_10_a_request_that_cannot_fit_names_both_numbers(target: Target):
    context = target.context_tokens()
    with unharmed(target):
        for prompt, wanted in (([5] * 10, context), ([5] * (context - 3), 4), ([5] * (context + 1), 1), ([5] * (context * 4), 1)):
            error = check_error(target.post(TEXT, {"prompt": prompt, "max_tokens": wanted}), {400})
            assert error["code"] == "context_length_exceeded"
            assert str(len(prompt)) in error["message"]
            assert str(context) in error["message"]


def test_row_11_sampling_is_refused_or_finite(target: Target):
    refused = [
        ("temperature", NAN),
        ("temperature", INF),
        ("temperature", -0.1),
        ("temperature", 1e308),
        ("top_p", 0),
        ("top_p", 1.0000001),
    ]
    refused += [("top_p", -1), ("top_k", -2), ("top_k", 2**40), ("top_k", 1.5), ("min_p", 2), ("min_p", -0.1), ("presence_penalty", 3)]
    refused += [("frequency_penalty", -3), ("repetition_penalty", 0), ("repetition_penalty", 1e9), ("min_tokens", -1), ("min_tokens", 3)]
    defined = [
        ("temperature", -0.0),
        ("temperature", 0),
        ("temperature", 1e-45),
        ("temperature", 1e-300),
        ("temperature", 100),
        ("top_p", 1),
    ]
    defined += [("top_p", 1e-30), ("top_k", -1), ("top_k", 0), ("top_k", 2**31 - 1), ("min_p", 1), ("repetition_penalty", 1e-30)]
    with unharmed(target):
        for field, value in refused:
            check_error(target.post(TEXT, text(**{field: value})), {400})
        for raw in (b"1e999", b"-1e999", b"NaN", b"Infinity"):
            check_error(target.post(TEXT, b'{"prompt":"a","temperature":' + raw + b"}"), {400})
        for field, value in defined:
            check_finite(target.post(TEXT, text(logprobs=2, **{field: value})))


def test_row_13_stop_strings_match_across_token_borders(target: Target):
    """A combining character may be cut anywhere by a tokenizer; the text before it comes out, nothing of it does."""
    with unharmed(target):
        plain = target.post(TEXT, {"prompt": "hello", "max_tokens": 8, "temperature": 0, "ignore_eos": True}).json()["choices"][0]["text"]
        if len(plain) < 5:
            pytest.skip("this model's answer is too short to cut")
        stop = plain[2:5]
        answer = target.post(TEXT, {"prompt": "hello", "max_tokens": 8, "temperature": 0, "ignore_eos": True, "stop": stop}).json()
        assert answer["choices"][0]["text"] == plain[: plain.index(stop)]
        assert target.post(TEXT, text(stop=["e\u0301\u0323", "\U0001f9ff"])).status_code == 200


def test_row_16_special_tokens_in_content_stay_text(target: Target):
    """The ids of a message with such text, less those of one without, hold no id that the template wrote."""

    def ids(content: str) -> list[int]:
        answer = target.post("/tokenize", {"messages": [{"role": "user", "content": content}]})
        if answer.status_code == 400:
            pytest.skip("this model has no chat template")
        return answer.json()["tokens"]

    with unharmed(target):
        bare = ids("x")
        texts = {token: target.post("/detokenize", {"tokens": [token]}).json()["prompt"] for token in set(bare)}
        control = {token: written for token, written in texts.items() if written.startswith("<") and written.endswith(">")}
        for token, written in control.items():
            assert ids(f"x{written}system").count(token) == bare.count(token)
            assert ids(written).count(token) == bare.count(token)


@pytest.mark.parametrize("piece", ["a", " ", "🦊", "ab c", "\u0301"])
def test_row_17_floods_of_text_leave_the_loop_free(target: Target, piece: str):
    """Beyond the byte cap nothing is tokenized; below it, others are answered meanwhile."""
    others, over = [], threading.Event()

    def ping() -> None:
        while not over.is_set():
            others.append(target.client.get("/health").status_code)

    with unharmed(target):
        for size in (10**7, 10**6):
            flood = piece * (size // len(piece.encode()))
            thread, before = threading.Thread(target=ping), len(others)
            thread.start()
            try:
                check_error(target.post(TEXT, {"prompt": flood}), {400, 413})
                check_error(target.post(CHAT, {"messages": [{"role": "user", "content": flood}]}), {400, 413})
            finally:
                over.set()
                thread.join()
                over.clear()
            assert len(others) > before
        assert set(others) == {200}
