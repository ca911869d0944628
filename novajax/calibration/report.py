"""What a calibration found, as one value: the JSON that is written, and what the page is drawn from."""

import msgspec

from novajax.calibration.loss import Loss


class FormatCost(msgspec.Struct, frozen=True, kw_only=True):
    """One matrix in one format, all others unrounded."""

    format: str
    bytes: int
    estimated: float
    """KL in nats a token, by gradients."""
    measured: float | None
    """The same, measured; None: not asked for."""
    change: float | None
    """Of perplexity, relative."""


class MatrixReport(msgspec.Struct, frozen=True, kw_only=True):
    """One matrix."""

    name: str
    component: str
    parameters: int
    chosen: str
    largest_input: float | None
    """Of |x| over the calibration text; None: its inputs were not watched, its 4-bit forms are not compensated."""
    typical_input: float | None
    formats: tuple[FormatCost, ...]


class MapReport(msgspec.Struct, frozen=True, kw_only=True):
    """A whole map, on the evaluation text."""

    name: str
    kind: str
    """chosen, uniform, mix or profile."""
    treatment: str
    """"plain": to nearest; "compensated": 4-bit errors compensated, scales learned; behind it whether activations were rounded too."""
    bytes: int
    share: float
    """Of the float32 weights'."""
    loss: Loss


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """All of a run."""

    model: str
    text: tuple[str, ...]
    evaluation_text: tuple[str, ...]
    """Empty: the last rows of `text`."""
    row_tokens: int
    calibration_rows: int
    sensitivity_rows: int
    evaluation_rows: int
    float32_bytes: int
    perplexity: float
    """Unrounded, on the evaluation text."""
    predicted: float
    """KL of the chosen map, the sum over its matrices."""
    rank_correlation: dict[str, float]
    """Spearman's, of estimated and measured KL over matrices, by format; "layers": of a layer's sums in the smallest format."""
    matrices: tuple[MatrixReport, ...]
    maps: tuple[MapReport, ...]
    """The chosen one first."""
