"""How a tokenizer reads captions: what it cannot read is dropped in silence by the model, so somebody has to say it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Reading:
    """What a policy does not read of a caption."""

    unknown: tuple[str, ...]  # words that are all the same to it, each once, in their order
    cut: str  # the end of the caption, beyond the model's length


def tokenize(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], length: int, **options: Any) -> Any:
    """Captions cut at `length` tokens, or padded to it on the right. One way to call it, because a fast tokenizer keeps
    length and padding of the last call as its state, which threads share."""
    return tokenizer(
        list(texts), padding="max_length", padding_side="right", truncation=True, max_length=length, **options
    )


def read_caption(tokenizer: PreTrainedTokenizerFast, text: str, length: int) -> Reading:
    """Which words of `text` are not in the vocabulary, and what of it comes after the first `length` tokens."""
    batch = tokenize(tokenizer, [text], length, return_offsets_mapping=True)
    tokens = list(zip(batch["input_ids"][0], batch["offset_mapping"][0], strict=True))
    unknown = [text[start:end] for token, (start, end) in tokens if token == tokenizer.unk_token_id and start < end]
    return Reading(tuple(dict.fromkeys(unknown)), text[max(end for _, (_, end) in tokens) :].strip())
