"""The report as one HTML file without references: tables, and two plots drawn as SVG.

Invariant: everything from outside (names of files and parameters) is escaped.
"""

import html
import math
from collections.abc import Iterable, Sequence

from novajax.calibration.report import MapReport, MatrixReport, Report

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:62em;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;margin:1em 0}td,th{padding:.15em .7em;border-bottom:1px solid #ddd;text-align:right}"
    "td:first-child,th:first-child,td:nth-child(2),th:nth-child(2){text-align:left}"
    "svg{width:100%;height:auto}svg text{font:11px system-ui,sans-serif}"
)
_COLOURS = {"chosen": "#c2255c", "uniform": "#1971c2", "mix": "#2b8a3e", "profile": "#e67700"}
_PARTS = {"embedding": "#c2255c", "attention_qkv": "#1971c2", "attention_out": "#2b8a3e", "mlp": "#e67700", "head": "#5f3dc4"}
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 900, 420, 70, 40
_MOST_BARS = 80


def page(report: Report) -> str:
    """A whole HTML document."""
    chosen = report.maps[0]
    title = f"{report.model}: {chosen.share:.3f} of the float32 bytes, perplexity {chosen.loss.change:+.2%}"
    text = ", ".join(report.evaluation_text) or f"the last rows of {', '.join(report.text)}"
    learned = ", ".join(report.text)
    where = (
        f"Rows of {report.row_tokens} tokens. Rounded and learned on {report.calibration_rows} rows of {learned}, sensitivity on "
        f"{report.sensitivity_rows} of them; losses on {report.evaluation_rows} rows of {text}, where the unrounded model has "
        f"perplexity {report.perplexity:.4f}. Intervals of 95 % over rows. Loss that the matrices' own losses predict for the "
        f"chosen map: {report.predicted:.4f} nats."
    )
    ranks = ", ".join(f"{name} {value:.3f}" for name, value in report.rank_correlation.items())
    rows = [
        (
            one.name,
            one.treatment,
            f"{one.share:.4f}",
            f"{one.loss.divergence:.4f} ± {one.loss.divergence_spread:.4f}",
            f"{one.loss.change:+.2%} ({one.loss.change_low:+.2%} to {one.loss.change_high:+.2%})",
            f"{one.loss.agreement:.2%} ± {one.loss.agreement_spread:.2%}",
        )
        for one in report.maps
    ]
    formats = list(dict.fromkeys(cost.format for matrix in report.matrices for cost in matrix.formats))
    cells = [(matrix.name, matrix.chosen, _number(matrix.largest_input), *_costs(matrix, formats)) for matrix in report.matrices]
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title><style>{_STYLE}</style>",
        f"<h1>{html.escape(title)}</h1><p>{html.escape(where)}</p>",
        "<h2>Loss against bytes</h2><p>Hollow: rounded to nearest; filled: 4-bit errors compensated and scales learned.</p>",
        _losses([one for one in report.maps if "activations" not in one.treatment]),
        _table(("map", "treatment", "bytes / float32", "KL, nats a token", "perplexity", "same most likely token"), rows),
        "<h2>Matrices by sensitivity</h2>",
        f"<p>KL of each in {_smallest(report)} alone; the tick is the estimate by gradients.",
        f" Rank correlation of estimate and measurement: {html.escape(ranks)}.</p>" if ranks else "</p>",
        _bars(report),
        _table(("matrix", "chosen", "largest input", *formats), cells),
        "</html>",
    ]
    return "\n".join(parts)


def _losses(maps: Sequence[MapReport]) -> str:
    """Scatter: bytes to the right, KL on a logarithmic scale upwards."""
    shown = [one for one in maps if one.loss.divergence > 0]
    if not shown:
        return ""
    low, high = (way(math.log10(one.loss.divergence) for one in shown) for way in (min, max))
    low, high = math.floor(low), max(math.ceil(high), math.floor(low) + 1)
    most = max(one.share for one in shown) * 1.05

    def at(share: float, divergence: float) -> tuple[float, float]:
        up = (min(max(math.log10(divergence), low), high) - low) / (high - low)
        return _LEFT + share / most * (_WIDTH - _LEFT - 20), (_HEIGHT - _BOTTOM) * (1 - up) + 10 * up

    drawn = []
    for power in range(low, high + 1):
        _, y = at(0, 10.0**power)
        drawn.append(_line(_LEFT, y, _WIDTH - 20, y, "#ddd") + _text(_LEFT - 6, y + 4, f"{10.0**power:g}", "end"))
    for step in range(int(most * 10) + 1):
        x, _ = at(step / 10, 10.0**low)
        drawn.append(_line(x, _HEIGHT - _BOTTOM, x, 10, "#eee") + _text(x, _HEIGHT - _BOTTOM + 16, f"{step / 10:.1f}", "middle"))
    for one in shown:
        colour, loss = _COLOURS[one.kind], one.loss
        x, y = at(one.share, loss.divergence)
        ends = [at(one.share, max(loss.divergence + sign * loss.divergence_spread, 10.0**low))[1] for sign in (-1, 1)]
        fill = "none" if one.treatment == "plain" else colour
        told = html.escape(f"{one.name}, {one.treatment}: {one.share:.3f}, KL {loss.divergence:.4f}")
        drawn.append(_line(x, ends[0], x, ends[1], colour))
        drawn.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{fill}" stroke="{colour}"><title>{told}</title></circle>')
    drawn += [_key(number, name, colour) for number, (name, colour) in enumerate(_COLOURS.items())]
    drawn.append(_text(_WIDTH / 2, _HEIGHT - 6, "bytes, share of float32", "middle") + _text(4, 12, "KL, nats a token", "start"))
    return _svg(_HEIGHT, drawn)


def _bars(report: Report) -> str:
    """A bar for each matrix in the format that all have and that loses most, the largest first."""
    name = _smallest(report)
    costs = [(matrix, next(cost for cost in matrix.formats if cost.format == name)) for matrix in report.matrices]
    pairs = [(matrix, cost.estimated if cost.measured is None else cost.measured, cost.estimated) for matrix, cost in costs]
    pairs = sorted(pairs, key=lambda pair: -pair[1])[:_MOST_BARS]
    most = max(max(found, estimate) for _, found, estimate in pairs) or 1.0
    drawn, left = [], 190
    for number, (matrix, found, estimate) in enumerate(pairs):
        y, long, tick = 24 + 15 * number, *((_WIDTH - left - 70) * value / most for value in (found, estimate))
        drawn.append(_text(left - 6, y + 9, matrix.name, "end") + _text(left + max(long, tick) + 6, y + 9, f"{found:.2g}", "start"))
        drawn.append(f'<rect x="{left}" y="{y}" width="{long:.1f}" height="11" fill="{_PARTS[matrix.component]}"/>')
        drawn.append(_line(left + tick, y - 1, left + tick, y + 12, "#000"))
    drawn += [_key(number, name, colour) for number, (name, colour) in enumerate(_PARTS.items())]
    return _svg(30 + 15 * len(pairs), drawn)


def _smallest(report: Report) -> str:
    """The last format that every matrix has."""
    first, *rest = ([cost.format for cost in matrix.formats] for matrix in report.matrices)
    return [name for name in first if all(name in names for names in rest)][-1]


def _costs(matrix: MatrixReport, formats: Sequence[str]) -> Iterable[str]:
    found = {cost.format: cost.estimated if cost.measured is None else cost.measured for cost in matrix.formats}
    return (_number(found.get(name)) for name in formats)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _svg(height: float, drawn: Iterable[str]) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {height}" role="img">{"".join(drawn)}</svg>'


def _line(x: float, y: float, to_x: float, to_y: float, colour: str) -> str:
    return f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{to_x:.1f}" y2="{to_y:.1f}" stroke="{colour}"/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _key(number: int, name: str, colour: str) -> str:
    x = _WIDTH - 560 + 110 * number
    return f'<rect x="{x}" y="2" width="9" height="9" fill="{colour}"/>' + _text(x + 13, 11, name, "start")
