import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from novajax.core.errors import InternalError
from novajax.kv.manager import KVManager

TOKENS = list(range(1, 41))


def manager(pages: int = 8, page_tokens: int = 4, **kwargs) -> KVManager:
    return KVManager(pages, page_tokens, key=b"key", **kwargs)


def served(kv: KVManager, tokens: list[int], salt: str = "") -> tuple[int, tuple[int, ...]]:
    """Leases, computes, commits and releases; returns cached tokens and pages."""
    lease = kv.lease(tokens, kv.chain("", salt))
    assert lease is not None
    pages = lease.pages
    kv.commit(lease, tokens, len(tokens))
    kv.release(lease)
    return lease.cached_tokens, pages


def counts(kv: KVManager) -> tuple[int, int, int]:
    assert kv.check() == []
    return kv.free, kv.cached, kv.held


def test_a_lease_covers_its_tokens_and_comes_back():
    kv = manager()
    lease = kv.lease(TOKENS[:9], kv.chain("", ""))
    assert lease is not None
    assert len(lease.pages) == 3
    assert counts(kv) == (5, 0, 3)
    kv.release(lease)
    assert counts(kv) == (8, 0, 0)
    with pytest.raises(InternalError, match="twice"):
        kv.release(lease)


def test_full_pages_are_found_again_but_the_last_token_is_always_computed():
    kv = manager()
    assert served(kv, TOKENS[:9])[0] == 0
    assert counts(kv) == (6, 2, 0)
    assert served(kv, TOKENS[:9])[0] == 8
    assert served(kv, TOKENS[:8])[0] == 4  # the second page is known too, but token 7's logits are wanted
    assert served(kv, TOKENS[:10])[0] == 8
    assert (kv.query_tokens, kv.hit_tokens) == (36, 20)


def test_what_a_lease_would_find_can_be_asked_before():
    kv = manager()
    served(kv, TOKENS[:9])
    before = counts(kv), kv.query_tokens
    chain = kv.chain("", "")
    assert [kv.cached_tokens(TOKENS[:9], chain, most, cached_multiple=m) for most, m in ((None, 1), (7, 1), (None, 8), (7, 8))] == [
        8,
        4,
        8,
        0,
    ]
    assert kv.cached_tokens(TOKENS[:9], kv.chain("", "other")) == 0
    assert manager(prefix_cache=False).cached_tokens(TOKENS[:9], chain) == 0
    assert (counts(kv), kv.query_tokens) == before


def test_only_committed_pages_are_found():
    kv = manager()
    lease = kv.lease(TOKENS[:12], kv.chain("", ""))
    assert lease is not None
    kv.commit(lease, TOKENS, 7)
    other = kv.lease(TOKENS[:12], kv.chain("", ""))
    assert other is not None
    assert other.cached_tokens == 4
    assert other.pages[0] == lease.pages[0]
    assert not set(other.pages[1:]) & set(lease.pages)
    assert counts(kv) == (3, 0, 5)


def test_tenants_and_adapters_share_nothing():
    kv = manager()
    served(kv, TOKENS[:9], "one")
    assert served(kv, TOKENS[:9], "two")[0] == 0
    assert served(kv, TOKENS[:9], "one")[0] == 8
    lease = kv.lease(TOKENS[:9], kv.chain("lora", "one"))
    assert lease is not None
    assert lease.cached_tokens == 0


def test_max_cached_and_its_multiple_bound_the_shared_part():
    kv = manager(pages=16)
    served(kv, TOKENS[:20])
    for max_cached, multiple, expected in ((0, 1, 0), (11, 1, 8), (None, 8, 16), (15, 8, 8), (None, 6, 12), (None, 100, 0)):
        lease = kv.lease(TOKENS[:20], kv.chain("", ""), max_cached, cached_multiple=multiple)
        assert lease is not None
        assert lease.cached_tokens == expected
        kv.release(lease)


def test_a_lease_that_does_not_fit_changes_nothing():
    kv = manager()
    served(kv, TOKENS[:9])
    held = kv.lease(TOKENS[20:36], kv.chain("", ""))
    before = counts(kv)
    assert kv.lease(TOKENS[:25], kv.chain("", "")) is None
    assert kv.lease(TOKENS[:9], kv.chain("", ""), spare_pages=2) is None
    assert counts(kv) == before == (2, 2, 4)
    assert (kv.query_tokens, kv.hit_tokens) == (25, 0)
    assert kv.lease(TOKENS[:9], kv.chain("", ""), spare_pages=1) is not None
    assert held is not None


def test_growth_evicts_cached_pages_last_page_first():
    kv = manager(pages=4)
    served(kv, TOKENS[:12])
    assert counts(kv) == (1, 3, 0)
    lease = kv.lease([0], kv.chain("", ""))
    assert lease is not None
    first = lease.pages
    assert kv.extend(lease, 4)
    assert lease.pages is first  # nothing to add: the same object, so that a packed page table stays valid
    assert kv.extend(lease, 5)
    assert lease.pages[:1] == first
    assert counts(kv) == (0, 2, 2)
    probe = kv.lease(TOKENS[:9], kv.chain("", ""))  # the first two pages are still known, no page is left for the rest
    assert probe is None
    assert kv.extend(lease, 9)
    assert not kv.extend(lease, 20)
    assert counts(kv) == (0, 1, 3)
    kv.release(lease)
    assert served(kv, TOKENS[:9])[0] == 4


def test_of_two_copies_the_first_is_shared_and_both_come_back():
    kv = manager()
    leases = [kv.lease(TOKENS[:9], kv.chain("", "")) for _ in range(2)]
    for lease in leases:
        assert lease is not None
        kv.commit(lease, TOKENS, 9)
    assert counts(kv) == (2, 0, 6)
    for lease in leases:
        assert lease is not None
        kv.release(lease)
    assert counts(kv) == (6, 2, 0)


def test_bad_numbers_are_forgotten_but_shared_ones_stay():
    kv = manager()
    served(kv, TOKENS[:5])
    lease = kv.lease(TOKENS[:13], kv.chain("", ""))
    assert lease is not None
    kv.commit(lease, TOKENS, 13)
    kv.forget(lease)
    assert counts(kv) == (4, 0, 4)
    kv.release(lease)
    assert counts(kv) == (7, 1, 0)
    assert served(kv, TOKENS[:13])[0] == 4


def test_without_prefix_cache_nothing_is_kept():
    kv = manager(prefix_cache=False)
    served(kv, TOKENS[:9])
    assert served(kv, TOKENS[:9])[0] == 0
    assert counts(kv) == (8, 0, 0)
    assert kv.query_tokens == 0


def test_a_lost_page_is_counted_and_quarantined_not_fatal():
    kv = manager()
    lease = kv.lease(TOKENS[:12], kv.chain("", ""))
    assert lease is not None
    kv.commit(lease, TOKENS, 4)
    lost = lease.pages[2]
    lease.pages = lease.pages[:2]
    found = kv.check()
    assert found == [f"page {lost} has 1 references, its holders count 0"]
    assert kv.violations == 1
    assert (kv.free, kv.cached, kv.held, kv.quarantined) == (5, 0, 2, 1)
    assert kv.capacity_tokens == 28
    assert kv.check() == []
    kv.release(lease)
    assert kv.lease(TOKENS[:28], kv.chain("", "")) is not None
    assert kv.lease([0], kv.chain("", "")) is None


def test_a_page_in_a_wrong_list_is_repaired():
    kv = manager()
    lease = kv.lease(TOKENS[:9], kv.chain("", ""))
    assert lease is not None
    kv.commit(lease, TOKENS, 9)
    kv._cache.abandon(lease.pages[0])  # held, and yet open to eviction
    assert len(kv.check()) == 1
    assert counts(kv) == (5, 0, 3)
    kv.release(lease)
    kv._cache.claim(lease.pages[0] if lease.pages else 0)  # cached, and yet never evictable
    assert len(kv.check()) == 1
    assert counts(kv) == (6, 2, 0)


class ManagerMachine(RuleBasedStateMachine):
    """Leases of random sequences over few tokens; a dict says what each page holds, and no shared page may ever change."""

    def __init__(self):
        super().__init__()
        self.leases: list = []
        self.content: dict[tuple[int, int], tuple] = {}

    @initialize(pages=st.integers(1, 12), page_tokens=st.integers(1, 4))
    def begin(self, pages, page_tokens):
        self.kv = KVManager(pages, page_tokens, key=b"key")

    def compute(self, lease, tokens, start):
        size = self.kv.page_tokens
        for position in range(start, len(tokens)):
            page = lease.pages[position // size]
            assert page not in self.kv._cache
            assert self.kv._pages.references(page) == 1
            self.content[page, position % size] = tuple(tokens[: position + 1])

    @rule(tokens=st.lists(st.integers(0, 2), min_size=1, max_size=14), salt=st.sampled_from(["", "other"]))
    def lease(self, tokens, salt):
        tokens = [*tokens] if not salt else [token + 10 for token in tokens]  # so that the salts' contents differ, as weights would
        lease = self.kv.lease(tokens, self.kv.chain("", salt))
        if lease is None:
            assert self.kv.pages_for(len(tokens)) > self.kv.free
            return
        size = self.kv.page_tokens
        for position in range(lease.cached_tokens):
            assert self.content[lease.pages[position // size], position % size] == tuple(tokens[: position + 1])
        self.compute(lease, tokens, lease.cached_tokens)
        self.leases.append((lease, tokens))

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), more=st.lists(st.integers(0, 2), min_size=1, max_size=6))
    def grow(self, data, more):
        lease, tokens = data.draw(st.sampled_from(self.leases))
        if self.kv.extend(lease, len(tokens) + len(more)):
            before = len(tokens)
            tokens += more
            self.compute(lease, tokens, before)

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), part=st.floats(0, 1))
    def commit(self, data, part):
        lease, tokens = data.draw(st.sampled_from(self.leases))
        self.kv.commit(lease, tokens, int(len(tokens) * part))

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), forget=st.booleans())
    def release(self, data, forget):
        lease, _ = data.draw(st.sampled_from(self.leases))
        self.leases = [entry for entry in self.leases if entry[0] is not lease]
        if forget:
            self.kv.forget(lease)
        self.kv.release(lease)

    @invariant()
    def sound(self):
        if hasattr(self, "kv"):
            assert self.kv.check() == []
            assert self.kv.free + self.kv.cached + self.kv.held == self.kv.total
            assert self.kv.held == len({page for lease, _ in self.leases for page in lease.pages})

    def teardown(self):
        for lease, _ in self.leases:
            self.kv.release(lease)
        if hasattr(self, "kv"):
            assert self.kv.held == 0
            whole = self.kv.lease([5] * self.kv.capacity_tokens, self.kv.chain("", ""))  # every cached page can be evicted
            assert whole is not None


TestManagerMachine = ManagerMachine.TestCase
TestManagerMachine.settings = settings(
    max_examples=150, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
