"""Owns which KV pages are free and how many holders each other page has.

Invariant: a page is in the free list exactly when nobody refers to it; a quarantined page is neither free nor held.
Knows nothing of tokens, sequences or the arrays behind the pages: a page is an integer.
"""

from collections.abc import Mapping

from novajax.core.errors import InternalError


class PageAllocator:
    """Pages 0 .. pages-1, each free, referred to one or more times, or quarantined."""

    def __init__(self, pages: int):
        self.total = pages
        self._references = [0] * pages
        self._free = list(range(pages - 1, -1, -1))  # popped from the end, so low pages go first
        self._quarantined: set[int] = set()

    @property
    def free(self) -> int:
        """Number of free pages."""
        return len(self._free)

    @property
    def quarantined(self) -> int:
        """Number of pages that were lost and are kept out of use."""
        return len(self._quarantined)

    def references(self, page: int) -> int:
        return self._references[page]

    def alloc(self, count: int) -> list[int] | None:
        """`count` pages with one reference each, or None if fewer are free: all or nothing."""
        if count > len(self._free):
            return None
        if count <= 0:
            return []
        pages = self._free[-count:][::-1]
        del self._free[-count:]
        for page in pages:
            self._references[page] = 1
        return pages

    def share(self, page: int) -> None:
        """One more holder of a page that has one already. Raises InternalError for a free page."""
        if self._references[page] < 1:
            raise InternalError(f"page {page} is shared but nobody holds it")
        self._references[page] += 1

    def release(self, page: int) -> int:
        """One holder fewer; the last one frees the page. Returns the holders left; raises InternalError if there were none."""
        left = self._references[page] - 1
        if left < 0:
            raise InternalError(f"page {page} is released but nobody holds it")
        self._references[page] = left
        if left == 0:
            self._free.append(page)
        return left

    def violations(self, expected: Mapping[int, int] | None = None) -> list[str]:
        """What is wrong, in words; empty when sound. `expected`: references per page as the holders count them."""
        found = []
        free = set(self._free)
        if len(free) != len(self._free):
            found.append(f"{len(self._free) - len(free)} pages are in the free list twice")
        for page, references in enumerate(self._references):
            if page in self._quarantined:
                continue
            if references < 0 or (references == 0) != (page in free):
                found.append(f"page {page} has {references} references and is {'free' if page in free else 'not free'}")
            if expected is not None and references != expected.get(page, 0):
                found.append(f"page {page} has {references} references, its holders count {expected.get(page, 0)}")
        return found

    def check(self) -> None:
        """Raises InternalError with the list of violations, if any."""
        if found := self.violations():
            raise InternalError("; ".join(found))

    def reconcile(self, expected: Mapping[int, int]) -> None:
        """Makes the books agree with the holders. A page that is neither free nor held is quarantined, not freed: whoever
        lost it may still write to it."""
        free = set(self._free)
        kept = set()
        self._quarantined -= expected.keys()
        for page in range(self.total):
            wanted = expected.get(page, 0)
            if wanted == 0 and page not in self._quarantined:
                if page in free and self._references[page] == 0:
                    kept.add(page)
                else:
                    self._quarantined.add(page)
            self._references[page] = wanted
        self._free = sorted(kept, reverse=True)
