import pytest

from novajax.core.errors import InternalError
from novajax.kv.pages import PageAllocator


def test_alloc_is_all_or_nothing_and_pages_are_distinct():
    pages = PageAllocator(5)
    assert pages.alloc(6) is None
    assert pages.free == 5
    first = pages.alloc(3)
    second = pages.alloc(2)
    assert first == [0, 1, 2]
    assert second == [3, 4]
    assert pages.alloc(1) is None
    assert pages.alloc(0) == []
    pages.check()


def test_a_shared_page_is_freed_by_its_last_holder():
    pages = PageAllocator(2)
    assert pages.alloc(1) == [0]
    pages.share(0)
    assert pages.release(0) == 1
    assert pages.free == 1
    assert pages.release(0) == 0
    assert pages.free == 2
    pages.check()


@pytest.mark.parametrize("misuse", [PageAllocator.share, PageAllocator.release])
def test_a_free_page_has_no_holder(misuse):
    pages = PageAllocator(2)
    with pytest.raises(InternalError, match="page 1"):
        misuse(pages, 1)


def test_violations_name_the_page():
    pages = PageAllocator(3)
    pages.alloc(2)
    assert pages.violations({0: 1, 1: 1}) == []
    assert pages.violations({0: 2, 1: 1}) == ["page 0 has 1 references, its holders count 2"]
    pages._free.append(1)
    pages._free.append(1)
    with pytest.raises(InternalError, match=r"1 pages are in the free list twice; page 1 has 1 references and is free"):
        pages.check()


def test_reconcile_believes_the_holders_and_quarantines_what_nobody_has():
    pages = PageAllocator(4)
    pages.alloc(3)
    pages._free.append(0)  # free and held: must not be handed out again
    pages.reconcile({0: 1, 1: 2})
    assert pages.violations({0: 1, 1: 2}) == []
    assert (pages.free, pages.quarantined) == (1, 1)
    assert pages.alloc(1) == [3]
    pages.reconcile({0: 1, 1: 2, 2: 1, 3: 1})  # the lost page turned up with a holder
    assert pages.quarantined == 0
    assert pages.release(2) == 0
