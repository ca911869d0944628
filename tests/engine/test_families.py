"""Every model family through the serving step: chunked prefill and decode over scattered pages give the tokens of transformers.

Here the paged attention meets windows, soft caps and grouped heads of real layouts. The committed nano checkpoints hold what
transformers answered; their prompts are longer than the local windows.
"""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from novajax.engine import inputs, step
from novajax.engine.buckets import Bucket
from novajax.engine.layout import Kernels, Layout
from novajax.kv.pool import KVPool, abstract_pool, pool_bytes
from novajax.parallel.mesh import make_mesh
from novajax.scheduler.plan import DecodeRow, Draw, PrefillRow, StepPlan
from novajax.telemetry.progress import Silent
from novajax.weights.load import load_model

NANO = Path(__file__).parents[1] / "data" / "nano"
FAMILIES = sorted(path.name for path in NANO.iterdir())
PAGE, PAGES = 8, 20
CHUNK = 12
"""Divides neither the page nor the prompt."""


class Stepper:
    """A model, its pool, and the two compiled shapes of a lone sequence."""

    def __init__(self, name: str, kernels: Kernels = "plain"):
        mesh = make_mesh(devices=jax.devices()[:1])
        loaded = load_model(NANO / name, mesh, jnp.float32, progress=Silent)
        cfg = loaded.config
        pool = abstract_pool(len(cfg.layers), PAGES, cfg.kv_heads, PAGE, cfg.head_dim, jnp.dtype(jnp.float32))
        # What earlier owners left in the pages must not matter.
        self.pool = jax.tree.map(lambda a: jnp.full(a.shape, 1e3, a.dtype), pool)
        self.pages = tuple(int(page) for page in np.random.default_rng(0).permutation(PAGES)[:8])
        self.last = jnp.zeros(1, jnp.int32)
        self._weights = loaded.state
        self._layout = Layout(mesh, cfg, kernels=kernels)
        self.forward = jax.jit(
            partial(step.forward, loaded.graphdef, layout=self._layout), static_argnames=("bucket", "rows"), donate_argnums=1
        )

    def run(self, plan: StepPlan, bucket: Bucket) -> np.ndarray:
        return np.asarray(self.step(plan, bucket, bucket.rows).logits)

    def arguments(self, plan: StepPlan | None, bucket: Bucket) -> tuple:
        packed = jnp.asarray(inputs.pack(plan, bucket, 1, 1))[:, None]
        return self._weights, self.pool, None, self.last, None, packed

    def step(self, plan: StepPlan | None, bucket: Bucket, rows: int) -> step.Stepped:
        stepped = self.forward(*self.arguments(plan, bucket), bucket=bucket, rows=rows)
        self.pool = stepped.pool
        return stepped


def greedy(model: Stepper, prompt: list[int], count: int) -> list[int]:
    tokens, draw, width = list(prompt), Draw(), len(model.pages)
    logits = np.zeros((1, 1))
    for start in range(0, len(prompt), CHUNK):
        chunk = tuple(prompt[start : start + CHUNK])
        row = PrefillRow(0, start, chunk, model.pages, start + CHUNK >= len(prompt), False, -1, draw, False)
        logits = model.run(StepPlan(0, (), (row,), (), 2, (1, CHUNK)), Bucket(2, 1, CHUNK, width))[2:]
    for _ in range(count - 1):
        tokens.append(int(logits[0].argmax()))
        # The newest token is taken from the device, as a step that runs ahead does.
        model.last = jnp.asarray([tokens[-1]], jnp.int32)
        row = DecodeRow(0, len(tokens) - 1, model.pages, draw, False, -1)
        logits = model.run(StepPlan(0, (row,), (), (), 2, None), Bucket(2, 0, 0, width))
    return [*tokens, int(logits[0].argmax())][len(prompt) :]


@pytest.mark.parametrize(("name", "kernels"), [*((name, "plain") for name in FAMILIES), ("llama3", "gpu"), ("gemma2", "gpu")])
def test_the_serving_step_equals_transformers(name: str, kernels: Kernels):
    """Also with the kernel for a GPU, interpreted."""
    with np.load(NANO / name / "expected.npz") as expected:
        prompt, wanted = expected["prompt"].tolist(), expected["greedy"].tolist()
    assert greedy(Stepper(name, kernels), prompt, len(wanted)) == wanted


def test_padding_writes_nothing():
    model = Stepper("llama2")
    before = jax.tree.map(np.asarray, model.pool)
    bucket = Bucket(2, 1, CHUNK, len(model.pages))
    logits = model.step(None, bucket, 5).logits
    after = jax.tree.map(np.asarray, model.pool)
    assert isinstance(after, KVPool)
    assert np.array_equal(before.keys.numbers, after.keys.numbers)
    assert np.array_equal(before.values.numbers, after.values.numbers)
    assert logits.shape[0] == 5
    assert np.isfinite(np.asarray(logits)).all()


def test_the_pool_is_written_in_place():
    """Donated and aliased: no copy of the pool in the compiled step."""
    model = Stepper("llama3")
    bucket = Bucket(2, 1, CHUNK, len(model.pages))
    compiled = model.forward.lower(*model.arguments(None, bucket), bucket=bucket, rows=3).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None
    assert analysis.alias_size_in_bytes == pool_bytes(model.pool)
    shape = ",".join(map(str, model.pool.keys.numbers.shape))
    assert f"f32[{shape}]{{4,3,2,1,0}} copy(" not in (compiled.as_text() or "")
