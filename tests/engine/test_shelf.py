"""Compiled programs on disk: found again, made again when damaged or different, kept nowhere that others may write."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from novajax.engine.shelf import Shelf, describe_arrays


class Maker:
    """A program that writes in place, and how often it was compiled."""

    def __init__(self) -> None:
        self.made = 0

    def __call__(self):
        self.made += 1
        step = jax.jit(lambda state, x: ({"a": state["a"].at[0].add(x)}, x * 2), donate_argnums=0)
        return step.lower({"a": jnp.zeros(4)}, jnp.float32(0)).compile()


def answer(program) -> list[float]:
    state, doubled = program({"a": jnp.ones(4)}, jnp.float32(3))
    return [*np.asarray(state["a"]).tolist(), float(doubled)]


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_kept_program_is_not_made_again_and_does_the_same(tmp_path: Path):
    first, second = Maker(), Maker()
    wanted = answer(Shelf(str(tmp_path), "engine").get("step", first))
    kept = Shelf(str(tmp_path), "engine").get("step", second)
    assert answer(kept) == wanted == [4, 1, 1, 1, 6]
    assert kept.memory_analysis().alias_size_in_bytes == 16
    assert (first.made, second.made) == (1, 0)


def test_other_engines_and_other_names_are_told_apart(tmp_path: Path):
    make = Maker()
    for engine, name in (("one", "step"), ("two", "step"), ("one", "sample"), ("one", "step")):
        Shelf(str(tmp_path), engine).get(name, make)
    assert make.made == 3
    assert describe_arrays({"a": jnp.zeros(3)}) != describe_arrays({"a": jnp.zeros(4)})
    assert describe_arrays({"a": jnp.zeros(3)}) != describe_arrays({"b": jnp.zeros(3)})


@pytest.mark.parametrize("damage", [lambda data: data[:-7], lambda data: data[:80] + b"\0" + data[81:], lambda data: b""])
def test_a_damaged_program_is_made_again(tmp_path: Path, damage):
    make = Maker()
    Shelf(str(tmp_path), "engine").get("step", make)
    (path,) = files(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert answer(Shelf(str(tmp_path), "engine").get("step", make)) == [4, 1, 1, 1, 6]
    assert make.made == 2
    Shelf(str(tmp_path), "engine").get("step", make)
    assert make.made == 2


def test_nothing_is_kept_or_run_where_others_may_write(tmp_path: Path):
    make = Maker()
    tmp_path.chmod(0o777)
    for _ in range(2):
        Shelf(str(tmp_path), "engine").get("step", make)
    assert make.made == 2
    assert not files(tmp_path)
    Shelf("", "engine").get("step", make)
    assert make.made == 3


def test_only_the_sets_used_last_stay(tmp_path: Path):
    for number in range(15):
        Shelf(str(tmp_path), number).get("step", lambda: jax.jit(lambda x: x).lower(jnp.float32(0)).compile())
    assert len(files(tmp_path)) == 12
