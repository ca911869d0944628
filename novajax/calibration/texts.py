"""Text files as rows of tokens, read with grain: what a model is calibrated on, and what its losses are measured on.

Invariants: a row starts as the model's tokenizer starts a text and then holds a run of one file's tokens; no token is in two rows; a
batch is whole, what does not fill one is left out. Control tokens spelled in a file count as such: it is the owner's own text.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import grain
import numpy as np

from novajax.core.errors import ConfigError
from novajax.text.tokenizer import Tokenizer

Rows = grain.MapDataset[Any]
"""Of int32[row_tokens]."""


class RowSource:
    """A grain source over the rows of the files."""

    def __init__(self, files: Sequence[Path], tokenizer: Tokenizer, row_tokens: int):
        first = np.asarray(tokenizer.encode(""), np.int32)
        run = row_tokens - len(first)
        pieces = []
        for file, ids in zip(files, tokenizer.encode_batch([_read(file) for file in files], parse_special=True), strict=True):
            tokens = np.asarray(ids[len(first) :], np.int32)
            rows = tokens[: len(tokens) // run * run].reshape(-1, run)
            if not len(rows):
                raise ConfigError(f"{file}: {len(tokens)} tokens are less than one row of {row_tokens}", param="text")
            pieces.append(np.concatenate([np.tile(first, (len(rows), 1)), rows], axis=1))
        self._rows = np.concatenate(pieces)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: SupportsIndex) -> np.ndarray:
        return self._rows[int(index)]

    def __repr__(self) -> str:
        return f"RowSource(rows={len(self)})"


def rows_of(files: Sequence[Path], tokenizer: Tokenizer, row_tokens: int) -> Rows:
    """The rows of `files` in their order. Raises ConfigError for a file that cannot be read or is shorter than a row."""
    return grain.MapDataset.source(RowSource(files, tokenizer, row_tokens))


def split(rows: Rows, share: float) -> tuple[Rows, Rows]:
    """(the first rows, the last `share` of them): two runs of text, so that they share a document at most at the seam."""
    at = len(rows) - max(1, round(len(rows) * share))
    return rows[:at], rows[at:]


def batches(rows: Rows, batch_rows: int) -> Iterator[np.ndarray]:
    """int32[batch_rows, row_tokens] of as many rows as fill whole batches."""
    return iter(rows.batch(batch_rows, drop_remainder=True))


def _read(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: {error}", param="text") from None
