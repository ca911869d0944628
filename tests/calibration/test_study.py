"""The parts of a calibration on tiny models: inputs are seen, estimates rank like measurements, maps keep to their bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from novajax.calibration import maps, rounding
from novajax.calibration.loss import Measure
from novajax.calibration.matrices import matrices, rounded_of, unpacked, value
from novajax.calibration.page import page
from novajax.calibration.sensitivity import rank_correlation
from novajax.calibration.study import Settings, Study
from novajax.calibration.tune import tuned
from novajax.calibration.walk import Walk
from novajax.core.errors import CapacityError
from novajax.models.precision import quantized_state
from novajax.parallel.mesh import make_mesh
from novajax.quant.formats import parse
from novajax.telemetry.progress import Silent
from novajax.weights.load import LoadedModel, load_model


def load(name: str) -> LoadedModel:
    return load_model(f"tests/data/nano/{name}", make_mesh(devices=jax.devices()[:1]), jnp.float32, progress=Silent)


def rows(loaded: LoadedModel, seed: int) -> tuple[np.ndarray, ...]:
    return tuple(np.random.default_rng(seed).integers(0, loaded.config.vocab, (3, 4, 24), np.int32))


@pytest.fixture(scope="module")
def study() -> Study:
    loaded = load("llama2")
    settings = Settings(formats=("int8", "int4-32"), sensitivity_batches=3, measure=True, tune_steps=4, seed=0)
    return Study(loaded, rows(loaded, 0), rows(loaded, 1), settings, Silent)


def test_a_matrix_is_seen_with_its_inputs(study: Study):
    loaded, batches = study.loaded, rows(study.loaded, 0)
    model = nnx.merge(loaded.graphdef, loaded.state)
    x_TD = model.layers[0].attention_norm(model.scale(model.rows(jnp.asarray(np.concatenate(batches).reshape(-1)))))
    seen = Walk(loaded, loaded.state, batches).watch(loaded.state["layers"][0], [("attention", "q"), ("mlp", "down")])
    np.testing.assert_allclose(seen[("attention", "q")].moment, x_TD.T @ x_TD / len(x_TD), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(seen[("attention", "q")].largest, jnp.abs(x_TD).max(axis=0), rtol=1e-6)
    down = value(loaded.state, ("layers", 0, "mlp", "down"))
    assert seen[("mlp", "down")].moment.shape == (down.shape[0], down.shape[0])


def test_the_estimate_ranks_like_the_measurement(study: Study):
    for measured, estimated in ((study.measured[path], study.estimated[path]) for path in study.measured):
        assert measured[1] > measured[0] > 0
        assert estimated[1] > estimated[0] > 0
    assert min(study.rank_correlation().values()) > 0.7
    assert rank_correlation([1, 2, 2, 5], [10, 30, 30, 70]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [9, 4, 1]) == pytest.approx(-1)


def test_a_map_keeps_to_its_bytes_and_loses_less_with_more(study: Study):
    few, many = (study.within(int(share * study.float32_bytes)) for share in (0.24, 0.3))
    assert many[1] < few[1]
    state = study.rounded(few[0])
    report = study.report(*few, state, ["a <b>.txt"], [], compare=False)
    assert report.maps[0].share <= 0.24
    assert "a &lt;b&gt;.txt" in page(report)
    uniform = rounding.plain(study.loaded, maps.uniform(study.matrices, parse("int4-32-w")))
    assert report.maps[0].loss.divergence < study.evaluation.divergence(unpacked(uniform))
    rules = maps.map_rules(study.matrices, few[0])
    _, plain = nnx.split(nnx.eval_shape(lambda: nnx.merge(study.loaded.graphdef, study.loaded.state)))
    for path, one in rounded_of(quantized_state(plain, rules, on_cpu=False)).items():
        assert rounded_of(state)[path].format == one.format
        assert rounded_of(state)[path].scale.shape == one.scale.shape
    with pytest.raises(CapacityError, match="the smallest formats take"):
        study.within(1000)


@pytest.mark.slow
def test_a_loss_is_kept_to(study: Study):
    formats, _, state = study.at_most(0.002)
    assert Measure(study.loaded.graphdef, study.loaded.state, rows(study.loaded, 0)).loss(unpacked(state)).change <= 0.002
    assert maps.map_bytes(study.matrices, formats) < sum(matrix.bytes(None) for matrix in study.matrices)


def test_learned_scales_lose_less(study: Study):
    loaded = study.loaded
    state = rounding.plain(loaded, maps.uniform(study.matrices, parse("int4-32-w")))
    measure = Measure(loaded.graphdef, loaded.state, rows(loaded, 0))
    assert measure.divergence(unpacked(tuned(measure, state, 40, Silent))) < 0.9 * measure.divergence(unpacked(state))


@pytest.mark.slow
def test_experts_are_rounded_too():
    loaded = load("mixtral")
    formats = maps.uniform(matrices(loaded.state), parse("int4-32-w"))
    made, head = rounding.candidates(loaded, [parse("int4-32-w")], rows(loaded, 0), Silent)
    state = rounding.compensated(loaded, formats, head, rows(loaded, 0), Silent)
    assert rounded_of(state).keys() == {one.matrix.path for one in made}
    assert {one.matrix.component for one in made if one.largest_input is None} == {"embedding", "mlp"}
