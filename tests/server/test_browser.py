"""The web page in a headless Chromium, as a user uses it: chat, stop, complete, keys, dark, and nothing that text can run."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from chromium import Page, find_chromium

from novajax.core.fake import FakeBackend
from novajax.core.types import Request, Timing, Update, Usage
from novajax.server.fake import ServedFake, fake_card
from novajax.server.settings import ServerSettings, digest
from novajax.text.tokenizer import Tokenizer

pytestmark = pytest.mark.browser

KEY = "browser-key-0123456789"
SAID = """A **bold** start, `code` and a [link](https://example.org/).

- one
- two

```
x = "<img src=x onerror=document.title='run'>"
```

<script>document.title = 'run'</script><img src=x onerror="document.title='run'"> [bad](javascript:document.title='run')
"""


class Reciter(FakeBackend):
    """Says SAID, a few letters at a time, whatever it is asked; then counts on if told to ignore the end."""

    def __init__(self, tokenizer: Tokenizer):
        super().__init__(fake_card(tokenizer), step_s=0.005)
        self._ids = tuple(tokenizer.encode(SAID))
        self.aborts = 0

    async def submit(self, request: Request) -> AsyncIterator[Update]:
        self.live.add(request.id)
        done = False
        try:
            ids = self._ids if request.sampling.max_tokens is None else self._ids * 1000
            for start in range(0, len(ids), 8):
                await asyncio.sleep(self._step_s)
                yield Update(request_id=request.id, start=start, tokens=ids[start : start + 8])
            usage = Usage(len(request.prompt), len(ids))
            done = True
            yield Update(request_id=request.id, start=len(ids), finish_reason="stop", usage=usage, timing=Timing(0.0, 0.1, 0.5))
        finally:
            self.live.discard(request.id)
            self.aborts += not done


@pytest.fixture(scope="module")
def binary() -> str:
    found = find_chromium()
    if found is None:
        pytest.skip("no Chromium on this machine")
    return found


@pytest.fixture(scope="module")
def reciting(tokenizer: Tokenizer) -> Iterator[ServedFake]:
    with ServedFake(tokenizer, Reciter(tokenizer)) as running:
        yield running


@pytest.fixture(scope="module")
def browser(binary: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with Page(binary, tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def page(browser: Page, reciting: ServedFake) -> Page:
    browser.problems.clear()
    browser.open(reciting.url + "/")
    browser.until("document.getElementById('model').options.length")
    return browser


def ask(page: Page, text: str) -> None:
    page.run("document.getElementById('input').focus()")
    page.write(text)
    page.press("Enter", "\r")


def answered(page: Page, count: int = 1) -> None:
    page.until(f"document.querySelectorAll('.assistant').length === {count} && !document.querySelector('.live')")


def test_a_chat_streams_and_shows_its_speed(page: Page):
    ask(page, "hello")
    page.until("document.querySelectorAll('.live .text strong').length")
    answered(page)
    assert page.run("document.querySelector('.user .text').textContent") == "hello"
    assert page.run("document.querySelector('.assistant .text strong').textContent") == "bold"
    assert page.run("document.querySelectorAll('.assistant .text li').length") == 2
    meta = page.run("document.querySelector('.assistant .meta').textContent")
    assert "tokens" in meta
    assert "tok/s" in meta
    assert "first token" in meta
    assert page.run("document.getElementById('status').textContent").startswith("ready")
    ask(page, "and then?")
    answered(page, 2)
    assert page.problems == []


def test_nothing_that_the_model_says_runs(page: Page):
    ask(page, "attack")
    answered(page)
    assert page.run("document.title") == "NovaJAX"
    assert page.run("document.querySelectorAll('.assistant img, .assistant script').length") == 0
    assert page.run("[...document.querySelectorAll('.assistant a')].map(a => a.protocol).join()") == "https:"
    assert "<script>" in page.run("document.querySelector('.assistant .text').textContent")
    assert page.problems == []


@pytest.mark.parametrize("how", ["button", "Escape"])
def test_stop_ends_the_work(page: Page, reciting: ServedFake, how: str):
    backend = reciting.backend
    assert isinstance(backend, Reciter)
    before = backend.aborts
    page.run("document.getElementById('knob-max_tokens').value = 5")
    ask(page, "forever")
    page.until("document.querySelectorAll('.live .text li').length > 4")
    if how == "button":
        page.run("document.getElementById('stop').click()")
    else:
        page.press("Escape")
    answered(page)
    assert "stopped" in page.run("document.querySelector('.meta').textContent")
    end = time.monotonic() + 30
    while backend.aborts == before and time.monotonic() < end:
        time.sleep(0.01)
    assert backend.aborts == before + 1
    assert not backend.live
    page.run("document.getElementById('knob-max_tokens').value = ''")


def test_a_text_is_continued_and_can_be_taken_back(page: Page):
    page.run("document.getElementById('tab-raw').click()")
    page.write("Once ")
    page.run("document.getElementById('knob-max_tokens').value = 9")
    page.run("document.getElementById('continue').click()")
    page.until("document.getElementById('paper').value.length > 60")
    page.press("Escape")
    page.until("document.querySelectorAll('#raw-meta span').length > 1")
    assert page.run("document.getElementById('paper').value").startswith("Once A **bold**")
    page.run("document.getElementById('undo').click()")
    assert page.run("document.getElementById('paper').value") == "Once "
    page.run("document.getElementById('knob-max_tokens').value = ''")
    assert page.problems == []


def test_settings_become_the_request_and_the_command(page: Page):
    page.run("window.copied = []; navigator.clipboard.writeText = async (text) => { copied.push(text); }")
    page.run("document.getElementById('system').value = \"It's you\"")
    page.run("for (const [n, v] of [['temperature', 0.5], ['top_k', 7], ['seed', 3]]) document.getElementById('knob-' + n).value = v")
    ask(page, "hi")
    answered(page)
    page.run("[...document.querySelectorAll('.meta button')].find(b => b.textContent === 'Copy as curl').click()")
    command = page.until("window.copied[0]")
    for part in ("curl -N http://127.0.0.1:", '"temperature": 0.5', '"top_k": 7', '"seed": 3', "It'\\''s you", '"stream": true'):
        assert part in command
    assert '"top_p"' not in command


def test_light_and_dark_and_labels(page: Page):
    before = page.run("getComputedStyle(document.body).backgroundColor")
    page.run("document.getElementById('theme').click()")
    assert page.run("getComputedStyle(document.body).backgroundColor") != before
    unnamed = """[...document.querySelectorAll('button, input, select, textarea')].filter(e =>
        !e.textContent.trim() && !e.ariaLabel && !e.getAttribute('aria-label') && !(e.labels && e.labels.length)).map(e => e.outerHTML)"""
    assert page.run(unnamed) == []
    page.run("document.getElementById('tab-chat').focus()")
    page.press("ArrowRight")
    assert page.run("document.getElementById('tab-raw').getAttribute('aria-selected')") == "true"


def test_errors_and_keys(browser: Page, tokenizer: Tokenizer):
    with ServedFake(tokenizer, settings=ServerSettings(port=0, key_digests=(digest(KEY),))) as locked:
        browser.open(locked.url + "/")
        browser.until("document.getElementById('status').textContent.includes('needs an API key')")
        ask(browser, "hello")
        browser.until("document.querySelectorAll('.turn .error').length")
        assert "401" in browser.run("document.querySelector('.turn .error').textContent")
        browser.run("document.getElementById('key').focus()")
        browser.write(KEY)
        browser.until("document.getElementById('model').options.length")
        assert browser.run("sessionStorage.getItem('novajax-key')") == KEY
        assert browser.run("JSON.stringify(localStorage)").find(KEY) == -1
        browser.run("document.getElementById('knob-max_tokens').value = 4")
        ask(browser, "hello again")
        browser.until("document.querySelectorAll('.assistant .meta span').length > 3")
        browser.run("sessionStorage.clear()")


def test_it_fits_a_phone(binary: str, reciting: ServedFake, tmp_path: Path):
    with Page(binary, tmp_path, width=500, height=760) as page:
        page.open(reciting.url + "/")
        ask(page, "hello")
        answered(page)
        assert page.run("document.documentElement.scrollWidth <= innerWidth")
        assert page.run("getComputedStyle(document.getElementById('settings')).display") == "none"
        page.run("document.getElementById('panel').click()")
        assert page.run("getComputedStyle(document.getElementById('settings')).display") != "none"
