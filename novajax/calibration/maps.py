"""Maps from matrices to formats: the chosen one, and those that it has to beat.

Invariant: a map names matrices only; what it does not name stays as it is, in float32.
"""

from collections.abc import Callable, Sequence

from novajax.calibration.knapsack import Choice, Knapsack, Option
from novajax.calibration.matrices import Matrix
from novajax.calibration.rounding import Candidate, Map
from novajax.calibration.sensitivity import Costs
from novajax.models.stages import Path
from novajax.quant.formats import Format, parse
from novajax.quant.profile_file import FLOAT, Rules
from novajax.quant.profiles import UNROUNDED, format_of, rules_of

WEIGHTS = "-w"
"""Behind an integer format's name: activations stay as they are, so that only the weights' rounding is seen."""


def weight_only(name: str) -> Format:
    """The format of that name, activations left alone."""
    return parse(name if name == "fp8" else name + WEIGHTS)


def plain_name(form: Format) -> str:
    """A format's name without what it says of activations."""
    return form.name.removesuffix(WEIGHTS)


class Chooser:
    """Knows what every matrix costs in every format."""

    def __init__(self, candidates: Sequence[Candidate], costs: Costs):
        self._candidates = candidates
        self._forms: list[list[Format | None]] = [[*(one.format for one in each.rounded), None] for each in candidates]
        items = []
        for each, forms in zip(candidates, self._forms, strict=True):
            losses = [*map(float, costs[each.matrix.path]), 0.0]
            items.append([Option("", each.matrix.bytes(form), max(loss, 0.0)) for form, loss in zip(forms, losses, strict=True)])
        self._knapsack = Knapsack(items)

    def within(self, budget_bytes: int) -> tuple[Map, float]:
        """(the map, the loss it should have) of least loss in that many bytes of matrices. Raises CapacityError."""
        return self._map(self._knapsack.within(budget_bytes))

    def at_most(self, loss: float) -> tuple[Map, float]:
        """The same of fewest bytes with that loss, nats a token."""
        return self._map(self._knapsack.at_most(loss))

    def _map(self, choice: Choice) -> tuple[Map, float]:
        chosen = zip(self._candidates, self._forms, choice.options, strict=True)
        return {one.matrix.path: form for one, forms, option in chosen if (form := forms[option]) is not None}, choice.loss


def uniform(matrices: Sequence[Matrix], form: Format) -> Map:
    """One format for all."""
    return {matrix.path: form for matrix in matrices}


def named(matrices: Sequence[Matrix], name: str, *, tied: bool) -> Map:
    """A profile of the table, to the letter but for its activations."""
    rules = rules_of(name, tied=tied)
    found = {matrix.path: format_of(rules, matrix.name, on_cpu=False) for matrix in matrices}
    return {path: weight_only(form.name.removesuffix("-a8").removesuffix(WEIGHTS)) for path, form in found.items() if form is not None}


def mixed(matrices: Sequence[Matrix], small: Format, large: Format, budget_bytes: int, key: Callable[[Matrix], int]) -> Map:
    """`small` for all, and `large` for as many as the bytes allow, in the order of `key`."""
    made: dict[Path, Format] = dict(uniform(matrices, small))
    left = budget_bytes - map_bytes(matrices, made)
    for matrix in sorted(matrices, key=key):
        more = matrix.bytes(large) - matrix.bytes(small)
        if more <= left:
            made[matrix.path], left = large, left - more
    return made


def map_bytes(matrices: Sequence[Matrix], formats: Map) -> int:
    """Of all matrices, scales included."""
    return sum(matrix.bytes(formats.get(matrix.path)) for matrix in matrices)


def map_rules(matrices: Sequence[Matrix], formats: Map) -> Rules:
    """The map as a profile's rules: one for each matrix, then one for all that is no matrix. Activations are left to the machine."""
    forms = [(matrix.name, formats.get(matrix.path)) for matrix in matrices]
    return (*((name, FLOAT if form is None else plain_name(form)) for name, form in forms), (UNROUNDED, FLOAT))
