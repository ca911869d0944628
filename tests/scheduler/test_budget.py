import pytest

from novajax.core.errors import ConfigError
from novajax.scheduler.budget import Shapes

TABLE = Shapes(decode=(1, 4, 16), prefill=((1, 32), (4, 32), (1, 128), (1, 512)), score=(1, 16), step_tokens=600)


@pytest.mark.parametrize(("rows", "size"), [(0, 1), (1, 1), (2, 4), (4, 4), (5, 16), (16, 16)])
def test_decode_rows_take_the_smallest_size(rows, size):
    assert TABLE.decode_rows(rows) == size


@pytest.mark.parametrize(
    ("waiting", "shape"),
    [
        ([5], (1, 32)),
        ([100], (1, 128)),
        ([500], (1, 512)),
        ([4000], (1, 512)),
        ([140], (1, 128)),  # 12 tokens later cost less than 372 tokens of padding now
        ([30, 30, 30, 30], (4, 32)),
        ([30, 2], (1, 32)),
        ([4000, 30], (1, 512)),
    ],
)
def test_the_prefill_shape_is_the_best_use_of_a_step(waiting, shape):
    assert TABLE.prefill_shape([waiting], 4) == shape


def test_the_prefill_shape_stays_inside_the_budget():
    assert TABLE.prefill_shape([[4000]], 88) == (1, 512)
    assert TABLE.prefill_shape([[4000]], 89) == (1, 128)


def test_buckets_are_all_shapes_a_plan_can_have():
    table = Shapes(decode=(0, 8), prefill=((1, 16), (1, 64)), score=(1, 4), step_tokens=70)
    assert table.buckets() == [(8, None), (0, (1, 16)), (0, (1, 64)), (0, (1, 4)), (8, (1, 16)), (8, (1, 4))]
    fixed = Shapes(decode=(8,), prefill=((2, 16),), score=(2, 16), step_tokens=40, fixed=True)
    assert fixed.buckets() == [(8, (2, 16))]


@pytest.mark.parametrize(
    "table",
    [
        {"decode": (), "prefill": ((1, 8),), "step_tokens": 64},
        {"decode": (4, 2), "prefill": ((1, 8),), "step_tokens": 64},
        {"decode": (0,), "prefill": ((1, 8),), "step_tokens": 64},
        {"decode": (4,), "prefill": (), "step_tokens": 64},
        {"decode": (4,), "prefill": ((0, 8),), "step_tokens": 64},
        {"decode": (4,), "prefill": ((1, 61),), "step_tokens": 64},
        {"decode": (4,), "prefill": ((1, 8),), "score": (1, 61), "step_tokens": 64},
        {"decode": (2, 4), "prefill": ((1, 8),), "step_tokens": 64, "fixed": True},
        {"decode": (4,), "prefill": ((1, 8),), "score": (1, 4), "step_tokens": 64, "fixed": True},
    ],
)
def test_a_table_that_cannot_serve_is_refused(table):
    with pytest.raises(ConfigError):
        Shapes(**table)
