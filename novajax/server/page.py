"""GET /: the web page, one self-contained file. It holds no data, so it needs no key; every datum it shows does.

The content security policy admits exactly the file's own style and script, by hash, and connections to this server only.
"""

import base64
import hashlib
import re
from importlib.resources import files
from typing import Any

import msgspec
from litestar import Request, Response, get
from litestar.handlers import HTTPRouteHandler

_INLINE = re.compile(rb"<(script|style)>(.*?)</\1>", re.DOTALL)


class Page(msgspec.Struct, frozen=True):
    body: bytes
    etag: str
    policy: str


def read_page() -> Page:
    body = (files("novajax.server") / "page.html").read_bytes()
    hashes: dict[str, list[str]] = {"script": [], "style": []}
    for kind, text in _INLINE.findall(body):
        hashes[kind.decode()].append(f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'")
    policy = (
        f"default-src 'none'; script-src {' '.join(hashes['script'])}; style-src {' '.join(hashes['style'])}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return Page(body, f'"{hashlib.sha256(body).hexdigest()[:32]}"', policy)


def page_route(page: Page) -> HTTPRouteHandler:
    """The route that serves `page`."""

    @get("/", opt={"public": True})
    async def index(request: Request[Any, Any, Any]) -> Response[bytes]:
        headers = {
            "etag": page.etag,
            "cache-control": "no-cache",
            "content-security-policy": page.policy,
            "referrer-policy": "no-referrer",
        }
        if page.etag in request.headers.get("if-none-match", ""):
            return Response(b"", status_code=304, headers=headers)
        return Response(page.body, media_type="text/html; charset=utf-8", headers=headers)

    return index
