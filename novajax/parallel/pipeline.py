"""The pipeline over layers: which stage holds which layer, and the turn of activations from stage to stage.

Stage s holds layers s * n .. s * n + n - 1 in slots 0 .. n - 1. All stages run one program, so a slot must be of one
kind on every stage: depth is padded by whole periods of the pattern of layer kinds, and a layer that does not exist
leaves its input as it is. Each call of the step is one tick: every stage works on another microbatch, and hands it on.
With at least as many microbatches in flight as stages there is no bubble:

    tick      0   1   2   3   4   5
    stage 0   m0  m1  m2  m3  m0' m1'      m': the same sequences' next token, whose input
    stage 1       m0  m1  m2  m3  m0'      was drawn at the end of tick 3
    stage 2           m0  m1  m2  m3
    stage 3               m0  m1  m2
"""

import jax
from jax import lax

AXIS = "stage"


def hand_on(x: jax.Array, stages: int) -> jax.Array:
    """Every stage's array at the next one; the first stage gets zeros. Inside a shard_map over `stage`."""
    return lax.ppermute(x, AXIS, [(stage, stage + 1) for stage in range(stages - 1)])


def from_stage(x: jax.Array, stage: int) -> jax.Array:
    """One stage's array at all of them. Inside a shard_map over `stage`."""
    return lax.psum(jax.numpy.where(lax.axis_index(AXIS) == stage, x, jax.numpy.zeros_like(x)), AXIS)
