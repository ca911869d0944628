"""Owns who holds which KV page: leases of sequences and the prefix cache, over one page allocator.

At every moment free + cached + held (+ quarantined) = total, where cached pages are held by the cache alone. A page that two
leases share, or that the cache names, is never written again: a lease is told how many of its first tokens are already
computed, always whole pages, and writes only behind them.
One manager is one partition of one page group; several groups (local windows) or partitions (data and context
shards) are several managers. It knows nothing of slots, plans or device arrays.
"""

from collections import Counter
from collections.abc import Sequence

from novajax.core.errors import InternalError
from novajax.kv.pages import PageAllocator
from novajax.kv.prefix import Chain, EvictionPolicy, PrefixCache, least_recent


class Lease:
    """Pages of one sequence, in order of position. Made by `KVManager.lease`, ended by `KVManager.release`."""

    __slots__ = ("cached_tokens", "chain", "committed_pages", "own_from_page", "pages")

    def __init__(self, pages: tuple[int, ...], chain: Chain, cached_pages: int, page_tokens: int):
        self.pages = pages  # a new tuple when it grows: a plan may keep the old one, and `is` tells whether it changed
        self.chain = chain
        self.cached_tokens = cached_pages * page_tokens
        self.own_from_page = cached_pages  # pages before it were computed by others
        self.committed_pages = cached_pages  # pages before it were offered to the cache


class KVManager:
    """Leases pages, finds and keeps shared prefixes, evicts them when pages run out."""

    def __init__(
        self,
        total_pages: int,
        page_tokens: int,
        *,
        key: bytes,
        weights_digest: str = "",
        kv_format: str = "",
        prefix_cache: bool = True,
        policy: EvictionPolicy = least_recent,
    ):
        self.page_tokens = page_tokens
        self._pages = PageAllocator(total_pages)
        self._cache = PrefixCache(page_tokens, key, policy)
        self._prefix_cache = prefix_cache
        self._weights_digest = weights_digest
        self._kv_format = kv_format
        self._leases: set[Lease] = set()
        self.query_tokens = 0
        self.hit_tokens = 0
        self.violations = 0

    @property
    def total(self) -> int:
        return self._pages.total

    @property
    def free(self) -> int:
        """Pages that hold nothing."""
        return self._pages.free

    @property
    def cached(self) -> int:
        """Pages held by the prefix cache alone: free on demand."""
        return self._cache.unheld

    @property
    def held(self) -> int:
        """Pages in leases."""
        return self._pages.total - self._pages.free - self._cache.unheld - self._pages.quarantined

    @property
    def quarantined(self) -> int:
        return self._pages.quarantined

    @property
    def capacity_tokens(self) -> int:
        """The longest sequence that fits when it is alone."""
        return (self._pages.total - self._pages.quarantined) * self.page_tokens

    def chain(self, adapter: str, salt: str) -> Chain:
        """The empty chain of a new sequence: pages are shared only inside one (weights, KV format, adapter, salt).

        Names are equal in all managers with one key, weights and format, so a chain serves them all."""
        return Chain(self._cache.root(self._weights_digest, self._kv_format, adapter, salt))

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_tokens)

    def lease(
        self,
        tokens: Sequence[int],
        chain: Chain,
        max_cached: int | None = None,
        *,
        cached_multiple: int = 1,
        spare_pages: int = 0,
        counted: bool = True,
    ) -> Lease | None:
        """Pages for all of `tokens`, the first ones shared from the cache; None (and nothing changed) if too few are left.

        The cached part is a multiple of a page and of `cached_multiple` tokens, at most `max_cached` tokens, and always leaves the
        last token to compute, whose logits are wanted. `spare_pages` must remain available to others. `counted`: whether
        the look-up enters the hit statistics.
        """
        shared = self._match(tokens, chain, max_cached, cached_multiple)
        fresh_count = self.pages_for(len(tokens)) - len(shared)
        available = self.free + self.cached - sum(map(self._cache.is_unheld, shared))
        if fresh_count + spare_pages > available:
            return None
        for page in shared:
            self._pages.share(page)
            self._cache.claim(page)
        fresh = self._alloc(fresh_count)
        if fresh is None:
            raise InternalError(f"{fresh_count} pages were available and could not be allocated")
        lease = Lease((*shared, *fresh), chain, len(shared), self.page_tokens)
        self._leases.add(lease)
        if counted and self._prefix_cache:
            self.query_tokens += len(tokens)
            self.hit_tokens += lease.cached_tokens
        return lease

    def cached_tokens(self, tokens: Sequence[int], chain: Chain, max_cached: int | None = None, *, cached_multiple: int = 1) -> int:
        """How many tokens a lease would find computed. Changes nothing; for the choice between managers."""
        return len(self._match(tokens, chain, max_cached, cached_multiple)) * self.page_tokens

    def extend(self, lease: Lease, tokens_total: int) -> bool:
        """Adds pages until `tokens_total` tokens fit, evicting cached ones if need be. False: too few, nothing changed."""
        missing = self.pages_for(tokens_total) - len(lease.pages)
        if missing <= 0:
            return True
        fresh = self._alloc(missing)
        if fresh is None:
            return False
        lease.pages = (*lease.pages, *fresh)
        return True

    def commit(self, lease: Lease, tokens: Sequence[int], computed_tokens: int) -> None:
        """Offers to the cache the pages that became full: the KV of tokens[:computed_tokens] is in place and final."""
        full = computed_tokens // self.page_tokens
        if self._prefix_cache:
            for index in range(lease.committed_pages, full):
                page = lease.pages[index]
                if self._cache.insert(page, self._cache.name(lease.chain, tokens, index)):
                    self._pages.share(page)
        lease.committed_pages = max(lease.committed_pages, full)

    def release(self, lease: Lease) -> None:
        """Gives all pages back; those the cache names stay there until evicted. Raises InternalError the second time."""
        if lease not in self._leases:
            raise InternalError("a lease was released twice")
        self._leases.remove(lease)
        for page in reversed(lease.pages):  # last page first: see the order of eviction in `prefix`
            if self._pages.release(page) == 1 and page in self._cache:
                self._cache.abandon(page)
        lease.pages = ()

    def forget(self, lease: Lease) -> None:
        """Takes the pages this lease computed itself out of the cache: its numbers turned out to be bad."""
        for page in lease.pages[lease.own_from_page :]:
            if page in self._cache:
                self._cache.drop(page)
                self._pages.release(page)

    def check(self) -> list[str]:
        """Recounts every reference from the holders. Returns the violations, after counting them and repairing the books:
        a page that nobody has is quarantined, so that one fault costs a page and not the engine."""
        expected = Counter(page for lease in self._leases for page in lease.pages)
        unheld = {page for page in self._cache.pages() if page not in expected}
        found = [f"page {page} is cached and held, but listed as unheld" for page in self._cache.unheld_pages() if page not in unheld]
        found += [f"page {page} is cached and not held, but not listed as unheld" for page in unheld if not self._cache.is_unheld(page)]
        for page in self._cache.pages():
            (self._cache.abandon if page in unheld else self._cache.claim)(page)
        expected.update(self._cache.pages())
        counts = self._pages.violations(expected)
        if counts:
            self._pages.reconcile(expected)
        self.violations += len(found) + len(counts)
        return found + counts

    def _match(self, tokens: Sequence[int], chain: Chain, max_cached: int | None, cached_multiple: int) -> list[int]:
        """The pages a lease would share; see `lease`."""
        if not self._prefix_cache:
            return []
        most = len(tokens) - 1 if max_cached is None else min(max_cached, len(tokens) - 1)
        shared = self._cache.match(chain, tokens, most // self.page_tokens)
        while shared and len(shared) * self.page_tokens % cached_multiple:
            shared.pop()
        return shared

    def _alloc(self, count: int) -> list[int] | None:
        if count > self.free + self.cached:
            return None
        while self.free < count:
            page = self._cache.evict()
            if page is None or self._pages.release(page) != 0:
                raise InternalError("a page without a holder could not be evicted")
        return self._pages.alloc(count)
