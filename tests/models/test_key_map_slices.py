"""Any slice of our array comes from a slice of the foreign tensor, and the two agree element by element."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from novajax.models.families import keys

SIZES = dict(n=4, k=2, h=6, d=5, f=7, e=3, v=8)
FORMS = ["(n h) d -> d n h", "d (n h) -> n h d", "f d -> d f", "f d -> e d f", "(k h) -> k h", "v d -> v d", "d -> d"]


@given(form=st.sampled_from(FORMS), data=st.data())
@settings(max_examples=400, deadline=None)
def test_slice_of_ours_is_a_slice_of_theirs(form: str, data: st.DataObject):
    right = form.split("->")[1].split()
    left = form.split("->")[0].replace("(", "").replace(")", "").split()
    shape = tuple(SIZES[letter] for letter in right)
    theirs = np.arange(np.prod([SIZES[letter] for letter in left])).reshape(keys.source_shape(form, shape))
    # The definition, for the whole array at once: split every merged dimension, then permute.
    split = theirs.reshape([SIZES[letter] for letter in left]).transpose([left.index(letter) for letter in right if letter in left])
    index = []
    for letter, size in zip(right, shape, strict=True):
        start = data.draw(st.integers(0, size - 1), label=letter)
        index.append(slice(start, start + 1 if letter not in left else data.draw(st.integers(start + 1, size), label=letter)))
    wanted = split[tuple(part for letter, part in zip(right, index, strict=True) if letter in left)]
    read = theirs[keys.source_slice(form, shape, tuple(index))]
    ours = keys.place(form, shape, tuple(index), read)
    assert ours.shape == tuple(part.stop - part.start for part in index)
    np.testing.assert_array_equal(ours.reshape(wanted.shape), wanted)


@pytest.mark.parametrize("heads", [slice(0, 2), slice(2, 3), slice(0, 4)])
def test_whole_heads_are_read_exactly(heads: slice):
    """What sharding asks for: no byte more than the shard's own."""
    rows, columns = keys.source_slice("(n h) d -> d n h", (5, 4, 6), (slice(0, 5), heads, slice(0, 6)))
    assert (rows.stop - rows.start) * (columns.stop - columns.start) == 5 * (heads.stop - heads.start) * 6
