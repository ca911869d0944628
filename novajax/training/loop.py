"""The training loop: one compiled step per stage, a log of the loss, and sealed states to go on from after a stop.

Invariants: the run is decided by (recipe, document function, tokenizer); a resumed run sees the batches it would have
seen. It does not know what the documents say.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import grain
import jax
import jax.numpy as jnp
import msgspec
import optax
import orbax.checkpoint as ocp
from flax import nnx
from tokenizers import Tokenizer

from novajax.models.decoder import Decoder
from novajax.training.data import Document, batches
from novajax.training.loss import weighted_loss
from novajax.training.optimizer import optimizer
from novajax.training.recipe import Recipe, Stage

MakeDocument = Callable[[Stage], Document]
"""The document function of a stage."""
STAGE_STRIDE = 1 << 32
"""Documents of stage i start at i * STAGE_STRIDE: no stage repeats another's."""
Compiled = Callable[[nnx.State, Any, dict[str, jax.Array]], tuple[nnx.State, Any, dict[str, jax.Array]]]


class Point(msgspec.Struct, frozen=True):
    """One entry of the loss curve: the mean since the last one."""

    step: int
    loss: float
    gradient_norm: float
    tokens: int
    elapsed_s: float


class Trainer:
    """Owns weights, optimizer state and the batch iterator of one run; `close` releases the sealed states' manager."""

    def __init__(
        self, recipe: Recipe, model: Decoder, tokenizer: Tokenizer, make: MakeDocument, work: Path, compute: jnp.dtype = jnp.bfloat16
    ):
        self._recipe, self._tokenizer, self._make = recipe, tokenizer, make
        self._graph, self.params = nnx.split(model, nnx.Param)
        self._update = optimizer(recipe.optimizer, recipe.steps, model)
        self._state = self._update.init(self.params)
        self._compiled: Compiled = jax.jit(self._step, donate_argnums=(0, 1))
        self._compute = compute
        self._manager = ocp.CheckpointManager(work.absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=2))
        self.step, self.tokens, self.elapsed_s = 0, 0, 0.0
        self.curve: list[Point] = []
        self._iterator: grain.DatasetIterator | None = None

    @property
    def model(self) -> Decoder:
        """The decoder with the present float32 weights."""
        return nnx.merge(self._graph, self.params)

    def _step(self, params: nnx.State, state: Any, batch: dict[str, jax.Array]) -> tuple[nnx.State, Any, dict[str, jax.Array]]:
        (loss, weight), gradients = jax.value_and_grad(lambda p: weighted_loss(self._graph, p, batch, self._compute), has_aux=True)(params)
        updates, state = self._update.update(gradients, state, params)
        return (
            cast(nnx.State, optax.apply_updates(params, updates)),
            state,
            {"loss": loss, "weight": weight, "norm": optax.tree.norm(gradients)},
        )

    def run(self, report: Callable[[Point], None], log_every: int = 10, save_every: int = 200) -> None:
        """Train to the recipe's last step, from wherever this run stands."""
        last = 0
        for number, stage in enumerate(self._recipe.stages):
            last += stage.steps
            if self.step < last:
                self._iterator = self._iterator or self._batches(number, stage)
                self._run_until(last, self._iterator, report, log_every, save_every)
                self._iterator = None
        self.save()

    def _batches(self, number: int, stage: Stage) -> grain.DatasetIterator:
        return batches(self._make(stage), self._tokenizer, stage, number * STAGE_STRIDE)

    def _run_until(
        self, last: int, iterator: grain.DatasetIterator, report: Callable[[Point], None], log_every: int, save_every: int
    ) -> None:
        started, before_s, seen = time.monotonic(), self.elapsed_s, []
        while self.step < last:
            batch = next(iterator)
            self.params, self._state, out = self._compiled(self.params, self._state, batch)
            seen.append(out)
            self.step += 1
            self.tokens += int((batch["segments"] > 0).sum())
            if self.step % log_every == 0 or self.step == last:
                host = jax.device_get(seen)
                self.elapsed_s = before_s + time.monotonic() - started
                mean = {key: sum(float(row[key]) for row in host) / len(host) for key in ("loss", "norm")}
                point = Point(self.step, round(mean["loss"], 5), round(mean["norm"], 4), self.tokens, round(self.elapsed_s, 1))
                self.curve.append(point)
                report(point)
                seen = []
            if self.step % save_every == 0:
                self.save()

    def save(self) -> None:
        """Seal everything that `restore` needs."""
        if self._manager.latest_step() == self.step:
            return
        progress = {
            "tokens": self.tokens,
            "elapsed_s": self.elapsed_s,
            "curve": msgspec.to_builtins(self.curve),
            "iterator": json.dumps(self._iterator.get_state()) if self._iterator is not None else "",
        }
        trees = {"params": nnx.to_pure_dict(self.params), "optimizer": jax.tree.leaves(self._state)}
        self._manager.save(self.step, args=ocp.args.Composite(trees=ocp.args.StandardSave(trees), progress=ocp.args.JsonSave(progress)))
        self._manager.wait_until_finished()

    def restore(self) -> bool:
        """Go on from the last sealed state in the work folder; False when there is none."""
        step = self._manager.latest_step()
        if step is None:
            return False
        trees = {"params": nnx.to_pure_dict(self.params), "optimizer": jax.tree.leaves(self._state)}
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), trees)
        found = self._manager.restore(
            step, args=ocp.args.Composite(trees=ocp.args.StandardRestore(abstract), progress=ocp.args.JsonRestore())
        )
        nnx.replace_by_pure_dict(self.params, found["trees"]["params"])
        self._state = jax.tree.unflatten(jax.tree.structure(self._state), found["trees"]["optimizer"])
        progress = found["progress"]
        self.step, self.tokens, self.elapsed_s = step, progress["tokens"], progress["elapsed_s"]
        self.curve = msgspec.convert(progress["curve"], list[Point])
        self._iterator = self._iterator_at(step, progress["iterator"])
        return True

    def _iterator_at(self, step: int, state: str) -> grain.DatasetIterator | None:
        last = 0
        for number, stage in enumerate(self._recipe.stages):
            first, last = last, last + stage.steps
            if first < step < last and state:
                iterator = self._batches(number, stage)
                iterator.set_state(json.loads(state))
                return iterator
        return None

    def close(self) -> None:
        """Release the manager of sealed states."""
        self._manager.close()
