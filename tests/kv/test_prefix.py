from novajax.kv.prefix import Chain, PrefixCache

TOKENS = list(range(100, 112))  # three pages of four


def cache_of(pages: int, key: bytes = b"key") -> tuple[PrefixCache, Chain]:
    cache = PrefixCache(4, key)
    chain = Chain(cache.root("weights"))
    for index in range(pages):
        assert cache.insert(10 + index, cache.name(chain, TOKENS, index))
    return cache, chain


def test_match_finds_the_longest_known_prefix_of_full_pages():
    cache, _ = cache_of(2)
    root = cache.root("weights")
    assert cache.match(Chain(root), TOKENS, 3) == [10, 11]
    assert cache.match(Chain(root), TOKENS, 1) == [10]
    assert cache.match(Chain(root), TOKENS[:7], 3) == [10]
    assert cache.match(Chain(root), [*TOKENS[:4], 0, *TOKENS[5:]], 3) == [10]
    assert cache.match(Chain(root), [0, *TOKENS[1:]], 3) == []


def test_the_same_page_behind_another_page_is_another_page():
    cache, _ = cache_of(2)
    assert cache.match(Chain(cache.root("weights")), TOKENS[4:8], 1) == []


def test_roots_separate_everything_the_kv_depends_on():
    cache, _ = cache_of(2)
    for parts in (("other",), ("weights", ""), ("weight", "s"), ()):
        assert cache.match(Chain(cache.root(*parts)), TOKENS, 3) == []
    assert cache.root("ab", "c") != cache.root("a", "bc")
    assert cache.root("\ud800") != cache.root("")  # any string a client can send has a root


def test_names_depend_on_the_key_of_the_process():
    one, chain = cache_of(1, key=b"one")
    other = PrefixCache(4, b"two")
    assert len(one.name(chain, TOKENS, 0)) == 16
    assert one.root("weights") != other.root("weights")
    assert other.name(Chain(chain.root), TOKENS, 0) != chain.names[0]


def test_a_name_is_given_once():
    cache, chain = cache_of(1)
    assert not cache.insert(77, chain.names[0])
    assert 77 not in cache
    assert 10 in cache


def test_eviction_takes_the_page_longest_without_a_holder_and_never_a_held_one():
    cache, chain = cache_of(3)
    assert cache.evict() is None
    for page in (12, 11, 10):
        cache.abandon(page)
    cache.claim(11)
    cache.abandon(11)
    assert [cache.evict(), cache.evict(), cache.evict(), cache.evict()] == [12, 10, 11, None]
    assert cache.match(chain, TOKENS, 3) == []


def test_the_policy_is_a_function():
    cache = PrefixCache(4, b"key", policy=max)
    chain = Chain(cache.root())
    for index in range(3):
        cache.insert(20 - index, cache.name(chain, TOKENS, index))
        cache.abandon(20 - index)
    assert [cache.evict(), cache.evict()] == [20, 19]
