"""The short table of step shapes, of one data partition. Everything the engine will ever run is in it, and compiled before it says ready.

A bucket is (S decode rows x Y tokens) + (R prefill rows x C chunk tokens), W pages of table per row. Prefill pairs with the smallest
S (one row of prefill) and the largest S only: between them padding costs less than one more program. For the same reason
logits come in two heights, `sample_rows`. Guesses (Y > 1) take the place of rows that are not there: S x Y is at most the largest S.
"""

import msgspec

from novajax.core.config import EngineConfig
from novajax.core.errors import ConfigError

MOST_DRAFTS = 7
"""Guesses in a row's step: the next ones would seldom count, and eight tokens fill the units that products are made of."""
LEAST_DRAFTS = 3
"""With fewer a step more seldom pays than it costs a program."""


class Bucket(msgspec.Struct, frozen=True, order=True):
    """One compiled step shape."""

    decode_rows: int
    prefill_rows: int
    chunk_tokens: int
    table_pages: int
    score: bool = False
    """Also returns the logits of every prefill token (prompt log probabilities)."""
    drafts: int = 0
    """Y - 1: guesses that a decode row may have behind its token."""

    @property
    def decode_tokens(self) -> int:
        return self.decode_rows * (1 + self.drafts)

    @property
    def rows(self) -> int:
        """Rows that may draw a token: X = S x Y + R."""
        return self.decode_tokens + self.prefill_rows

    @property
    def tokens(self) -> int:
        return self.decode_tokens + self.prefill_rows * self.chunk_tokens

    @property
    def name(self) -> str:
        prefill = f" + prefill {self.prefill_rows}x{self.chunk_tokens}" if self.prefill_rows else ""
        drafts = f" x {1 + self.drafts}" if self.drafts else ""
        return f"decode {self.decode_rows}{drafts}{prefill}, {self.table_pages} pages{', scored' if self.score else ''}"


class BucketTable(msgspec.Struct, frozen=True):
    """All buckets of an engine and the shapes its scheduler may use."""

    decode_rows: tuple[int, ...]
    prefill: tuple[tuple[int, int], ...]
    score: tuple[int, int]
    table_pages: tuple[int, ...]
    deterministic: bool = False
    drafts: tuple[tuple[int, int], ...] = ()
    """(S, guesses of a row) of steps with guesses."""

    def buckets(self) -> tuple[Bucket, ...]:
        """Every program to compile, the ones a first request needs first."""
        wide = self.table_pages[-1]
        if self.deterministic:
            ((rows, chunk),) = self.prefill
            plain = Bucket(self.decode_rows[-1], rows, chunk, wide)
            return (plain, Bucket(self.decode_rows[-1], rows, chunk, wide, True))
        few, many = self.decode_rows[0], self.decode_rows[-1]
        first = [Bucket(few, rows, chunk, wide) for rows, chunk in self.prefill if rows == 1 and few < many]
        decode = [Bucket(rows, 0, 0, pages) for rows in self.decode_rows for pages in self.table_pages]
        mixed = [Bucket(many, rows, chunk, wide) for rows, chunk in self.prefill]
        drafting = [Bucket(rows, 0, 0, wide, drafts=drafts) for rows, drafts in self.drafts]
        return (*first, *decode, *drafting, *mixed, Bucket(many, *self.score, wide, True))

    def sample_rows(self, bucket: Bucket) -> int:
        """Rows of logits that a step of `bucket` hands to the sampler, padding included."""
        heights = sorted({self.decode_rows[0] + 1, self.decode_rows[-1] + max(rows for rows, _ in self.prefill)})
        return next(height for height in heights if height >= bucket.rows)

    def choose(self, decode_rows: int, prefill: tuple[int, int] | None, pages: int, score: bool, drafts: int = 0) -> Bucket:
        """The smallest bucket that holds a plan. Raises ConfigError if none does: a scheduler that left its shapes."""
        fits = [
            b
            for b in self.buckets()
            if b.decode_rows >= decode_rows and b.table_pages >= pages and b.score == score and self._prefill_fits(b, prefill)
            if b.drafts >= drafts
        ]
        if not fits:
            wanted = f"{decode_rows} decode rows, prefill {prefill}, {pages} pages, score={score}, {drafts} guesses"
            raise ConfigError(f"no bucket holds {wanted}")
        return min(fits, key=lambda b: (b.tokens, b.table_pages))

    def _prefill_fits(self, bucket: Bucket, prefill: tuple[int, int] | None) -> bool:
        if prefill is None:
            return self.deterministic or bucket.prefill_rows == 0
        return (bucket.prefill_rows, bucket.chunk_tokens) == prefill


def make_table(config: EngineConfig, max_request_tokens: int, *, on_cpu: bool) -> BucketTable:
    """The table for a model whose longest request is `max_request_tokens`.

    Raises ConfigError when rows or chunks cannot be cut evenly over the mesh, and for guesses where there can be none.
    """
    mesh = config.mesh
    if config.max_rows % mesh.data:
        raise ConfigError(f"max_rows={config.max_rows} is not a multiple of data={mesh.data}", param="max_rows")
    most_rows = -(-config.max_rows // (mesh.data * mesh.stage))  # a tick has a stage's share of the rows (`scheduler.pipeline`)
    widest = -(-max_request_tokens // (config.page_tokens * mesh.context))
    chunk = min(config.chunk_tokens, widest * config.page_tokens * mesh.context)
    if chunk % mesh.context:
        raise ConfigError(f"chunk_tokens={chunk} is not a multiple of context={mesh.context}", param="chunk_tokens")
    drafting = speculates(config)
    if config.deterministic:
        return BucketTable((most_rows,), ((1, chunk),), (1, chunk), (widest,), True)
    # One row matters on a CPU: its float32 products run at memory speed, those of two to four rows at half of that or less.
    rows = _ladder(1, most_rows, 4 if on_cpu else 2)
    widths = tuple(sorted({max(1, widest // 4), widest})) if on_cpu else (widest,)
    drafts = draft_shapes(rows) if drafting else ()
    if mesh.stage > 1:
        # A chunk keeps its place on the token axis from stage to stage, so all steps have the same prefill block.
        return BucketTable(rows, ((1, chunk),), (1, chunk), widths)
    small = min(32, chunk)
    several = (min(4, most_rows), min(64, chunk))
    prefill = {(1, small), (1, chunk)} | ({several} if several[0] > 1 else set())
    prefill = {(r, -(-c // mesh.context) * mesh.context) for r, c in prefill}
    score = (1, -(-min(chunk, 64) // mesh.context) * mesh.context)
    return BucketTable(rows, tuple(sorted(prefill, key=lambda s: (s[0] * s[1], s))), score, widths, drafts=drafts)


def speculates(config: EngineConfig) -> bool:
    """Whether steps may have guesses. Raises ConfigError where they are asked for and cannot be: how far such a step gets is known only
    when it has left the pipeline, and its bits are those of another shape."""
    can = config.mesh.stage == 1 and not config.deterministic
    if not can and (config.speculation in ("lookup", "draft") or (config.draft_model and config.speculation == "auto")):
        raise ConfigError("speculation works with one pipeline stage and without deterministic", param="speculation")
    if config.speculation == "draft" and not config.draft_model:
        raise ConfigError("speculation=draft needs a draft_model", param="draft_model")
    if config.draft_model and config.speculation == "lookup":
        raise ConfigError("speculation=lookup does not use a draft_model", param="draft_model")
    return can and config.speculation != "off"


def draft_shapes(decode_rows: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """(S, guesses of a row) of the steps that have some, which take the place of rows that are not there."""
    shapes = [(rows, min(MOST_DRAFTS, decode_rows[-1] // rows - 1)) for rows in decode_rows]
    return tuple(shape for shape in shapes if shape[1] >= LEAST_DRAFTS)


def _ladder(low: int, high: int, factor: int) -> tuple[int, ...]:
    """low, low * factor, ... and high itself."""
    steps = []
    while low < high:
        steps.append(low)
        low *= factor
    return (*steps, high)
