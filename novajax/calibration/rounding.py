"""Rounds a model by a map of formats, layer after layer: each sees the inputs that the rounded ones before it make.

Invariants: within a layer the matrices are rounded in the order in which their inputs are known; nothing of the model changes but the
matrices that have a format. Candidates are rounded on the unrounded model's inputs instead, each as if it were alone; the embedding,
which comes before all inputs, is always one of those.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from flax import nnx

from novajax.calibration.matrices import Matrix, matrices, replaced, restored, value
from novajax.calibration.walk import Statistics, Walk, turns
from novajax.models.stages import Path
from novajax.quant.formats import Format
from novajax.quant.qtensor import QTensor
from novajax.telemetry.progress import Report
from novajax.weights.load import LoadedModel

Map = Mapping[Path, Format]
"""The format of each matrix; one that is not in it stays as it is."""
EMBEDDING, HEAD = ("embed",), ("head",)


class Candidate(msgspec.Struct, frozen=True):
    """One matrix in every format that it may have, by what the unrounded model multiplies it by."""

    matrix: Matrix
    rounded: tuple[QTensor, ...]
    largest_input: float | None
    """Of |x|; None where inputs are not watched (experts, an embedding that is no head)."""
    typical_input: float | None
    """Root of the mean square."""


def candidates(
    loaded: LoadedModel, formats: Sequence[Format], batches: Sequence[np.ndarray], progress: Report
) -> tuple[tuple[Candidate, ...], Statistics]:
    """(every matrix in the order of the tree, the statistics of the head's inputs). Formats that come out alike for a matrix (groups
    longer than its inputs) are there once. `batches` are rows of calibration text."""
    found = matrices(loaded.state)
    made: dict[Path, Candidate] = {}

    def make(matrix: Matrix, seen: Statistics | None) -> None:
        distinct = {(form.kind, matrix.spec(form).block): form for form in reversed(formats)}
        moment = None if seen is None else seen.moment
        rounded = tuple(matrix.rounded(value(loaded.state, matrix.path), form, moment) for form in reversed(distinct.values()))
        largest, typical = (None, None) if seen is None else (float(seen.largest.max()), float(np.sqrt(np.diag(seen.moment).mean())))
        made[matrix.path] = Candidate(matrix, rounded, largest, typical)

    with progress(len(found), "matrices", "round each matrix alone") as shown:
        walk = Walk(loaded, loaded.state, batches)
        for layer, kind in enumerate(loaded.config.layers):
            own = loaded.state["layers"][layer]
            seen = walk.watch(own, sum(turns(kind), ()))
            for matrix in found:
                if matrix.path[:2] == ("layers", layer):
                    make(matrix, seen.get(matrix.path[2:]))
                    shown.advance()
            walk.step(own)
        head = walk.hidden(loaded.state)
        for matrix in found:
            if matrix.path in (EMBEDDING, HEAD):
                make(matrix, head if matrix.path == HEAD or loaded.config.tied_embedding else None)
                shown.advance()
    return tuple(made[matrix.path] for matrix in found), head


def plain(loaded: LoadedModel, formats: Map) -> nnx.State:
    """The weights rounded to nearest."""
    known = {matrix.path: matrix for matrix in matrices(loaded.state)}
    return replaced(loaded.state, {path: known[path].plain(value(loaded.state, path), form) for path, form in formats.items()})


def compensated(loaded: LoadedModel, formats: Map, head: Statistics, batches: Sequence[np.ndarray], progress: Report) -> nnx.State:
    """The weights with their errors compensated. `head` is of the unrounded model (`candidates`), for an embedding that is the head too;
    `batches` are rows of calibration text."""
    known = {matrix.path: matrix for matrix in matrices(loaded.state)}
    made: dict[Path, Any] = {}
    if EMBEDDING in formats:
        moment = head.moment if loaded.config.tied_embedding else None
        made[EMBEDDING] = known[EMBEDDING].rounded(value(loaded.state, EMBEDDING), formats[EMBEDDING], moment)
    with progress(len(loaded.config.layers), "layers", "round layer after layer") as shown:
        walk = Walk(loaded, replaced(loaded.state, {path: restored(one) for path, one in made.items()}), batches)
        for layer, kind in enumerate(loaded.config.layers):
            own = loaded.state["layers"][layer]
            wanted = [path for path in formats if path[:2] == ("layers", layer)]
            for turn in (*turns(kind), tuple(path[2:] for path in wanted if path[2:] not in sum(turns(kind), ()))):
                here = [path for path in wanted if path[2:] in turn]
                exact = [path[2:] for path in here if formats[path].kind == "int4" and turn in turns(kind)]
                seen = walk.watch(own, exact) if exact else {}
                for path in here:
                    moment = seen[path[2:]].moment if path[2:] in seen else None
                    made[path] = known[path].rounded(value(loaded.state, path), formats[path], moment)
                    own = replaced(own, {path[2:]: restored(made[path])})
            walk.step(own)
            shown.advance()
        if HEAD in formats:
            made[HEAD] = known[HEAD].rounded(value(loaded.state, HEAD), formats[HEAD], walk.hidden(loaded.state).moment)
    return replaced(loaded.state, made)
