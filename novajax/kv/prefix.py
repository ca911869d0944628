"""Owns the map from token prefixes to the pages that already hold their KV.

Only full pages are kept. Page i of a sequence is named by a 128-bit keyed BLAKE2b of (name of page i-1, its token ids); the
chain starts at a root that stands for everything else the KV depends on (weights, adapter, KV format, tenant). Token ids
are not stored: the key is drawn per process, so nobody can search for two prefixes of one name, and by chance a
clash among 2^40 pages has a probability near 2^-49; comparing ids would cost memory and time for nothing.

Eviction takes the page that has been without a holder longest. No tree is needed to keep parents longer than their children:
whoever holds a page holds all pages before it, and gives them back last page first, so a child is always older in that order
than its parent. One exception is accepted: two sequences that compute one prefix at the same time keep a copy each and only
the first is named here; its pages may then go before a child named by the other. Such a child cannot be found until its
parent is computed again, costs nothing and leaves by age.
"""

from array import array
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b

DIGEST_BYTES = 16

EvictionPolicy = Callable[[Mapping[int, bytes]], int]
"""Picks the page to give up among {page: name}, ordered by how long nobody has held it, longest first; never empty."""


def least_recent(unheld: Mapping[int, bytes]) -> int:
    return next(iter(unheld))


class Chain:
    """The page names of one growing token sequence, computed as far as anybody asked. Tokens once named must not change."""

    __slots__ = ("names", "root")

    def __init__(self, root: bytes):
        self.root = root
        self.names: list[bytes] = []


class PrefixCache:
    """Names of pages. It holds one reference to each page it names; the manager does the counting."""

    def __init__(self, page_tokens: int, key: bytes, policy: EvictionPolicy = least_recent):
        self._page_tokens = page_tokens
        self._key = key  # up to 64 bytes, drawn at random once per process
        self._policy = policy
        self._pages: dict[bytes, int] = {}
        self._names: dict[int, bytes] = {}
        # Ordered by the time the last holder left. An OrderedDict, because a dict whose front is deleted again and again scans its holes.
        self._unheld: OrderedDict[int, bytes] = OrderedDict()

    def __contains__(self, page: int) -> bool:
        return page in self._names

    @property
    def unheld(self) -> int:
        """Pages that nobody but the cache holds: those that can be evicted."""
        return len(self._unheld)

    def pages(self) -> list[int]:
        return list(self._names)

    def unheld_pages(self) -> list[int]:
        return list(self._unheld)

    def root(self, *parts: str) -> bytes:
        """The start of a chain for one combination of weights digest, adapter, KV format and tenant salt."""
        digest = blake2b(digest_size=DIGEST_BYTES, key=self._key)
        for part in parts:
            data = part.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "little") + data)  # with lengths, ("ab", "c") and ("a", "bc") differ
        return digest.digest()

    def name(self, chain: Chain, tokens: Sequence[int], index: int) -> bytes:
        """The name of full page `index` of `tokens`."""
        names, size = chain.names, self._page_tokens
        while len(names) <= index:
            start = len(names) * size
            parent = names[-1] if names else chain.root
            page = array("i", tokens[start : start + size]).tobytes()
            names.append(blake2b(parent + page, digest_size=DIGEST_BYTES, key=self._key).digest())
        return names[index]

    def match(self, chain: Chain, tokens: Sequence[int], limit_pages: int) -> list[int]:
        """The pages that hold the longest known prefix of `tokens`, at most `limit_pages` of them."""
        found = []
        for index in range(min(limit_pages, len(tokens) // self._page_tokens)):
            page = self._pages.get(self.name(chain, tokens, index))
            if page is None:
                break
            found.append(page)
        return found

    def insert(self, page: int, name: bytes) -> bool:
        """Names a page that a lease holds. False if that name has a page already: the caller keeps its copy to itself."""
        if name in self._pages or page in self._names:
            return False
        self._pages[name] = page
        self._names[page] = name
        return True

    def is_unheld(self, page: int) -> bool:
        return page in self._unheld

    def claim(self, page: int) -> None:
        """A lease took the page: it cannot be evicted now."""
        self._unheld.pop(page, None)

    def abandon(self, page: int) -> None:
        """The last lease gave the page back: only the cache refers to it."""
        self._unheld[page] = self._names[page]

    def evict(self) -> int | None:
        """Forgets one unheld page and returns it; None when every page is held."""
        if not self._unheld:
            return None
        page = self._policy(self._unheld)
        self.drop(page)
        return page

    def drop(self, page: int) -> None:
        """Forgets the name of a page."""
        del self._pages[self._names.pop(page)]
        self._unheld.pop(page, None)
