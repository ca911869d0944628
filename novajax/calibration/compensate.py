"""Rounds one matrix so that its product with the inputs it is used on changes least, and not each of its numbers.

After each input's weights are rounded, the weights of the inputs still to come take over its error, by the inverse second moment of
the inputs (Frantar et al. 2022, arXiv 2210.17323). Inputs go in order of falling second moment. Scales are chosen before, group
by group, from a range of clippings, by the squared error weighted with the moments. What is made is the stored format to the letter:
a QTensor's blocks, float32 scales, whole numbers from -8 to 7 (int4) or -127 to 127 (int8).
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from novajax.quant.qtensor import DTYPES, QTensor

LIMITS = {"int4": (-8, 7), "int8": (-127, 127)}
DAMPING = 0.01
"""Of the mean second moment, added to each: a moment of few tokens is not to be trusted to the last digit."""
CLIPPINGS = 32
"""Scales tried for a group, from half of what its largest weight needs to all of it."""
RUN = 128
"""Inputs after which the rest of the matrix is brought up to date, with one product."""


def compensated(weight: jax.Array, spec: QTensor, contracted: tuple[int, ...], moment: np.ndarray) -> QTensor:
    """`weight` in the integer format and blocks of the abstract `spec`, a matrix summed over the dimensions `contracted`; `moment` is
    float64 [inputs, inputs], the mean of x x^T over inputs in that order of dimensions."""
    low, high = LIMITS[spec.format.kind]
    order = (*contracted, *(axis for axis in range(len(spec.shape)) if axis not in contracted))
    w_IO = np.asarray(weight, np.float32).transpose(order).reshape(len(moment), -1)
    group_I = _groups(spec, contracted)
    moment = _damped(moment)
    scale_GO = np.asarray(_scales(w_IO, group_I, np.diag(moment).astype(np.float32), int(group_I[-1]) + 1, low, high))
    turn = np.argsort(-np.diag(moment), kind="stable")
    upper_II = np.linalg.cholesky(np.linalg.inv(moment[np.ix_(turn, turn)])).T
    rounded_IO = np.empty(w_IO.shape, np.int8)
    rounded_IO[turn] = _rounded(w_IO[turn], scale_GO[group_I[turn]], upper_II.astype(np.float32), low, high)
    values, scale = (
        jnp.asarray(part.reshape([shape[axis] for axis in order]).transpose(np.argsort(order)))
        for part, shape in ((rounded_IO, spec.shape), (scale_GO, spec.scale.shape))
    )
    return QTensor(values.astype(DTYPES[spec.format.kind]), scale, spec.block, spec.format)


def _groups(spec: QTensor, contracted: tuple[int, ...]) -> np.ndarray:
    """Which scale each input has, int[inputs]."""
    places = np.indices([spec.shape[axis] for axis in contracted]).reshape(len(contracted), -1)
    blocks = [place // spec.block[axis] for place, axis in zip(places, contracted, strict=True)]
    return np.ravel_multi_index(blocks, [spec.scale.shape[axis] for axis in contracted])


def _damped(moment: np.ndarray) -> np.ndarray:
    mean = float(np.trace(moment)) / len(moment)
    return moment + (DAMPING * mean if mean > 0 else 1.0) * np.eye(len(moment))


@partial(jax.jit, static_argnames=("groups", "low", "high"))
def _scales(w_IO: jax.Array, group_I: jax.Array, weigh_I: jax.Array, groups: int, low: int, high: int) -> jax.Array:
    """float32 [groups, O]; a group of zeros has the scale 1."""
    largest_GO = jax.ops.segment_max(jnp.abs(w_IO), group_I, groups)
    whole_GO = jnp.where(largest_GO > 0, largest_GO / high, 1.0)

    def tried(best: tuple[jax.Array, jax.Array], share: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        scale_GO = whole_GO * share
        error_IO = w_IO - scale_GO[group_I] * jnp.clip(jnp.round(w_IO / scale_GO[group_I]), low, high)
        error_GO = jax.ops.segment_sum(weigh_I[:, None] * error_IO**2, group_I, groups)
        better = error_GO < best[0]
        return (jnp.where(better, error_GO, best[0]), jnp.where(better, scale_GO, best[1])), None

    start = (jnp.full(whole_GO.shape, jnp.inf), whole_GO)
    return jax.lax.scan(tried, start, jnp.linspace(1.0, 0.5, CLIPPINGS))[0][1]


@partial(jax.jit, static_argnames=("low", "high"))
def _rounded(w_IO: jax.Array, scale_IO: jax.Array, upper_II: jax.Array, low: int, high: int) -> jax.Array:
    """int8 [I, O]; `upper_II` is the Cholesky factor U of the inverse moment U^T U."""
    inputs = w_IO.shape[0]
    more = -inputs % RUN
    w_IO, scale_IO = jnp.pad(w_IO, [(0, more), (0, 0)]), jnp.pad(scale_IO, [(0, more), (0, 0)], constant_values=1.0)
    upper_II = jnp.pad(upper_II, [(0, more), (0, more)]) + jnp.diag(jnp.arange(inputs + more) >= inputs)

    def run(number: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        w_IO, out_IO = carry
        start = number * RUN
        ahead_RI = jax.lax.dynamic_slice_in_dim(upper_II, start, RUN)
        here_RR = jax.lax.dynamic_slice_in_dim(ahead_RI, start, RUN, axis=1)
        scale_RO = jax.lax.dynamic_slice_in_dim(scale_IO, start, RUN)

        def one(w_RO: jax.Array, i: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            value_O = jnp.clip(jnp.round(w_RO[i] / scale_RO[i]), low, high)
            error_O = (w_RO[i] - value_O * scale_RO[i]) / here_RR[i, i]
            return w_RO - here_RR[i][:, None] * error_O, (value_O, error_O)

        _, (value_RO, error_RO) = jax.lax.scan(one, jax.lax.dynamic_slice_in_dim(w_IO, start, RUN), jnp.arange(RUN))
        w_IO = w_IO - jnp.matmul(ahead_RI.T, error_RO, precision=jax.lax.Precision.HIGHEST)
        return w_IO, jax.lax.dynamic_update_slice_in_dim(out_IO, value_RO.astype(jnp.int8), start, axis=0)

    return jax.lax.fori_loop(0, (inputs + more) // RUN, run, (w_IO, jnp.zeros(w_IO.shape, jnp.int8)))[1][:inputs]
