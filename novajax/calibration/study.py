"""From a model and text to a rounded model: candidates, their costs, the choice, the rounding, and what came of it.

Invariants: what is rounded, learned and chosen sees calibration rows only; every figure of a whole map is of evaluation rows. Maps are
compared after the same treatment as the chosen one.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import msgspec
import numpy as np
from flax import nnx

from novajax.calibration import maps, rounding, sensitivity
from novajax.calibration.loss import Loss, Measure
from novajax.calibration.maps import Chooser, plain_name, weight_only
from novajax.calibration.matrices import replaced, rounded_of, unpacked
from novajax.calibration.report import FormatCost, MapReport, MatrixReport, Report
from novajax.calibration.rounding import Candidate, Map
from novajax.calibration.sensitivity import rank_correlation
from novajax.calibration.tune import tuned
from novajax.core.errors import CapacityError
from novajax.quant.formats import Format, parse, settled
from novajax.quant.profile_file import FLOAT
from novajax.quant.qtensor import QTensor, stored_bytes
from novajax.telemetry import progress as shown
from novajax.weights.load import LoadedModel

PLAIN, TREATED = "plain", "compensated"
PROFILES = ("memory_critical", "balanced", "quality_critical")
_ATTEMPTS = 4
"""Of meeting a loss: the losses of matrices add up only about."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """How much work is done."""

    formats: tuple[str, ...]
    sensitivity_batches: int
    measure: bool
    """Sensitivity is measured, not only estimated."""
    tune_steps: int
    seed: int


class Study:
    """One model with its calibration and evaluation rows."""

    def __init__(
        self,
        loaded: LoadedModel,
        calibration: Sequence[np.ndarray],
        evaluation: Sequence[np.ndarray],
        settings: Settings,
        progress: shown.Report,
    ):
        """Batches are int32[rows, row_tokens]."""
        self.loaded, self._batches, self._settings, self._progress = loaded, tuple(calibration), settings, progress
        forms = [weight_only(name) for name in settings.formats]
        self.candidates, self._head = rounding.candidates(loaded, forms, self._batches, progress)
        self.matrices = [one.matrix for one in self.candidates]
        graph, state = loaded.graphdef, loaded.state
        self._calibration = Measure(graph, state, self._batches)
        self.evaluation = Measure(graph, state, evaluation)
        self.sensitivity = Measure(graph, state, self._batches[:: max(1, len(self._batches) // settings.sensitivity_batches)])
        self.estimated = sensitivity.estimated(self.sensitivity, self.candidates, settings.seed, progress)
        self.measured, self.changes = sensitivity.measured(self.sensitivity, self.candidates, progress) if settings.measure else ({}, {})
        self.chooser = Chooser(self.candidates, self.measured or self.estimated)
        total = sum(stored_bytes(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(state))
        self.float32_bytes = total
        self._other_bytes = total - sum(matrix.bytes(None) for matrix in self.matrices)

    def within(self, budget_bytes: int) -> tuple[Map, float]:
        """(map, predicted loss) of a model of at most so many bytes. Raises CapacityError with the least that is possible."""
        return self.chooser.within(budget_bytes - self._other_bytes)

    def at_most(self, change: float) -> tuple[Map, float, nnx.State]:
        """(map, predicted loss, rounded weights) of few bytes whose relative change of perplexity on the calibration text is at most
        `change`: the losses of matrices add up only about, so what they predict is corrected by what is found, `_ATTEMPTS` times.

        Raises CapacityError where that does not get there.
        """
        allowed, found = math.log1p(change), math.inf
        for _ in range(_ATTEMPTS):
            formats, predicted = self.chooser.at_most(allowed)
            state = self.rounded(formats)
            found = self._calibration.loss(unpacked(state)).change
            if found <= change:
                return formats, predicted, state
            allowed *= 0.95 * math.log1p(change) / math.log1p(found)
        raise CapacityError(f"a loss of {change:.2%} was not reached: {found:.2%} after {_ATTEMPTS} attempts", param="max_loss")

    def rounded(self, formats: Map) -> nnx.State:
        """The weights by that map, compensated, scales learned."""
        state = rounding.compensated(self.loaded, formats, self._head, self._batches, self._progress)
        return tuned(self._calibration, state, self._settings.tune_steps, self._progress)

    def report(
        self, formats: Map, predicted: float, state: nnx.State, text: Sequence[str], evaluation_text: Sequence[str], *, compare: bool
    ) -> Report:
        """What is to be said of the chosen map and its weights `state`; with `compare` also of what it has to beat."""
        kept = [self._reported("chosen", "chosen", TREATED, state), *self._served("chosen", "chosen", TREATED, state)]
        if compare:
            kept += self._others(kept[0].bytes)
        sizes = {
            measure: sum(len(batch) for batch in measure.batches) for measure in (self._calibration, self.sensitivity, self.evaluation)
        }
        return Report(
            model=self.loaded.directory.name,
            text=tuple(Path(file).name for file in text),
            evaluation_text=tuple(Path(file).name for file in evaluation_text),
            row_tokens=self.evaluation.batches[0].shape[1],
            calibration_rows=sizes[self._calibration],
            sensitivity_rows=sizes[self.sensitivity],
            evaluation_rows=sizes[self.evaluation],
            float32_bytes=self.float32_bytes,
            perplexity=self.evaluation.loss(self.loaded.state).perplexity,
            predicted=predicted,
            rank_correlation=self.rank_correlation(),
            matrices=tuple(self._matrix(one, formats.get(one.matrix.path)) for one in self.candidates),
            maps=tuple(kept),
        )

    def _others(self, chosen_bytes: int) -> Iterator[MapReport]:
        """Named profiles, one format for all, and mixes of two formats, plain and treated as the chosen map is; and what is chosen at
        the bytes of each uniform 4-bit map."""
        tied, matrices = self.loaded.config.tied_embedding, self.matrices
        for name in PROFILES:
            yield from self._both(name, "profile", maps.named(matrices, name, tied=tied), served=name == "memory_critical")
        seen: set[int] = set()
        for name in self._settings.formats:
            formats = maps.uniform(matrices, weight_only(name))
            size = maps.map_bytes(matrices, formats)
            if size in seen:
                continue
            seen.add(size)
            yield from self._both(f"all {name}", "uniform", formats)
            if weight_only(name).kind == "int4":
                yield self._reported(f"chosen at the bytes of all {name}", "chosen", TREATED, self.rounded(self.chooser.within(size)[0]))
        small, large = weight_only("int4-32"), weight_only("int8")
        for name, key in (("first", 1), ("last", -1)):
            order = {matrix.path: key * place for place, matrix in enumerate(matrices)}
            formats = maps.mixed(matrices, small, large, chosen_bytes - self._other_bytes, lambda matrix, order=order: order[matrix.path])
            yield from self._both(f"int4-32, the {name} matrices int8", "mix", formats)

    def _both(self, name: str, kind: str, formats: Map, *, served: bool = False) -> Iterator[MapReport]:
        """Plain, and where it holds 4-bit forms compensated."""
        states = [(PLAIN, rounding.plain(self.loaded, formats))]
        if any(form.kind == "int4" for form in formats.values()):
            states.append((TREATED, self.rounded(formats)))
        for treatment, state in states:
            yield self._reported(name, kind, treatment, state)
            if served:
                yield from self._served(name, kind, treatment, state)

    def _reported(self, name: str, kind: str, treatment: str, state: nnx.State) -> MapReport:
        return self._made(name, kind, treatment, state, self.evaluation.loss(unpacked(state)))

    def _served(self, name: str, kind: str, treatment: str, state: nnx.State) -> Iterator[MapReport]:
        """With activations rounded, on a machine that does so."""
        here = as_served(state)
        if any(one.format.activations == "int8" for one in rounded_of(here).values()):
            yield self._made(name, kind, f"{treatment}, int8 activations", state, self.evaluation.loss(here))

    def _made(self, name: str, kind: str, treatment: str, state: nnx.State, loss: Loss) -> MapReport:
        size = sum(stored_bytes(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(state))
        return MapReport(name=name, kind=kind, treatment=treatment, bytes=size, share=size / self.float32_bytes, loss=loss)

    def _matrix(self, one: Candidate, chosen: Format | None) -> MatrixReport:
        path, costs = one.matrix.path, []
        for number, form in enumerate(rounded.format for rounded in one.rounded):
            costs.append(
                FormatCost(
                    format=plain_name(form),
                    bytes=one.matrix.bytes(form),
                    estimated=float(self.estimated[path][number]),
                    measured=float(self.measured[path][number]) if self.measured else None,
                    change=float(self.changes[path][number]) if self.changes else None,
                )
            )
        return MatrixReport(
            name=one.matrix.name,
            component=one.matrix.component,
            parameters=math.prod(one.matrix.shape),
            chosen=FLOAT if chosen is None else plain_name(chosen),
            largest_input=one.largest_input,
            typical_input=one.typical_input,
            formats=tuple(costs),
        )

    def rank_correlation(self) -> dict[str, float]:
        """Spearman's, of estimate and measurement: over matrices for each format that all of them have, and over layers, by the sum over
        each one's matrices in its smallest of those formats. Empty where nothing was measured."""
        if not self.measured:
            return {}
        every = [[plain_name(one.format) for one in each.rounded] for each in self.candidates]
        shared = [name for name in every[0] if all(name in names for names in every)]
        found = {}
        for name in shared:
            pairs = [self._pair(each, names.index(name)) for each, names in zip(self.candidates, every, strict=True)]
            found[name] = rank_correlation(*zip(*pairs, strict=True))
        layers: dict[tuple, np.ndarray] = {}
        for each, names in zip(self.candidates, every, strict=True):
            if each.matrix.path[0] == "layers":
                before = layers.get(each.matrix.path[:2], np.zeros(2))
                layers[each.matrix.path[:2]] = before + self._pair(each, names.index(shared[-1]))
        if len(layers) > 2:
            found["layers"] = rank_correlation(*np.array(list(layers.values())).T)
        return found

    def _pair(self, one: Candidate, number: int) -> tuple[float, float]:
        return float(self.estimated[one.matrix.path][number]), float(self.measured[one.matrix.path][number])


def as_served(state: nnx.State) -> nnx.State:
    """The state with the machine's own choice of activations (`quant.formats.settled`)."""
    on_cpu = jax.default_backend() == "cpu"
    forms = {path: settled(parse(plain_name(one.format)), on_cpu=on_cpu) for path, one in rounded_of(state).items()}
    return replaced(state, {path: QTensor(one.values, one.scale, one.block, forms[path]) for path, one in rounded_of(state).items()})
