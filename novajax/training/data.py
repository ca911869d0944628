"""From generated documents to packed batches, with grain: source -> encode -> pack -> batch.

Documents are whole inside a row and know nothing of their neighbours (segment ids). The iterator's state is a small
dict: what it gives next can be saved and restored. It does not know models.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, SupportsIndex

import grain
import numpy as np
from tokenizers import Tokenizer

from novajax.training.recipe import Stage

BOS, END, PAD = "<|bos|>", "<|end|>", "<|pad|>"
ROLES = ("system", "user", "assistant")
LONGEST_CORPUS = 1 << 40
"""Documents are made by index, so a corpus has no natural end."""


class Segment(Protocol):
    """A message of a document: its role ("text" for bare text) and the weight of its tokens in the loss."""

    @property
    def role(self) -> str: ...
    @property
    def text(self) -> str: ...
    @property
    def weight(self) -> float: ...


Document = Callable[[int], Sequence[Segment]]


class DocumentSource:
    """A grain source over `make(index)`; nothing is kept."""

    def __init__(self, make: Document, length: int = LONGEST_CORPUS):
        self._make = make
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: SupportsIndex) -> Sequence[Segment]:
        return self._make(int(index))

    def __repr__(self) -> str:
        return f"DocumentSource(length={self._length})"


class Encode(grain.transforms.Map):
    """Segments -> {"tokens", "weights"}: the ids that the chat template would give, and how much each counts as a target."""

    def __init__(self, tokenizer: Tokenizer, longest_tokens: int):
        self._tokenizer = tokenizer
        self._longest_tokens = longest_tokens
        self._bos, self._end = tokenizer.token_to_id(BOS), tokenizer.token_to_id(END)
        self._roles = {role: tokenizer.token_to_id(f"<|{role}|>") for role in ROLES}

    def map(self, element: Any) -> Any:
        """A sequence of Segment -> {"tokens", "weights"}."""
        tokens, weights = [self._bos], [0.0]
        for segment in element:
            if segment.role != "text":
                tokens.append(self._roles[segment.role])
                weights.append(0.0)
            ids = self._tokenizer.encode(segment.text, add_special_tokens=False).ids
            tokens += [*ids, self._end]
            weights += [segment.weight] * (len(ids) + 1)
        longest = self._longest_tokens
        return {"tokens": np.asarray(tokens[:longest], np.int32), "weights": np.asarray(weights[:longest], np.float32)}


def batches(make: Document, tokenizer: Tokenizer, stage: Stage, first: int = 0) -> grain.DatasetIterator:
    """An endless, checkpointable iterator of {"tokens", "weights", "segments"}, each [rows, row_tokens]; segment 0 is padding.

    `first` is the index of the first document.
    """
    source = DocumentSource(lambda index: make(first + index))
    length = {"tokens": stage.row_tokens, "weights": stage.row_tokens}
    dataset = (
        grain.MapDataset.source(source)
        .map(Encode(tokenizer, stage.row_tokens))
        .to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=256))
    )
    dataset = grain.experimental.FirstFitPackIterDataset(dataset, length_struct=length, num_packing_bins=stage.rows, shuffle_bins=False)
    return iter(dataset.batch(stage.rows, drop_remainder=True).map(_named))


def _named(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"tokens": batch["tokens"], "weights": batch["weights"], "segments": batch["tokens_segment_ids"]}
