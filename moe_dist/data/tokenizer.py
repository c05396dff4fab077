"""Fits and reads byte-level BPE tokenizers. They can encode every text, and decoding the token ids gives the same text."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from moe_dist.errors import ConfigError, DataError
from moe_dist.formats.tokenizer_file import read_tokenizer, tokenizer_errors

PAD, BOS, EOS, BOI, EOI = SPECIALS = ("<pad>", "<bos>", "<eos>", "<boi>", "<eoi>")
SMALLEST_VOCAB = len(SPECIALS) + 256
_LONG_WORD = re.compile(r"\S{1000}")  # the time to fit is quadratic in the length of the longest word, such as a genome


def fit_tokenizer(texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """Fits a BPE tokenizer to texts. The special tokens get the first ids. A small corpus may give fewer than `vocab_size`
    tokens. Raises ConfigError if `vocab_size` is too small for the special tokens and all bytes."""
    if vocab_size < SMALLEST_VOCAB:
        raise ConfigError(
            f"vocab_size={vocab_size} is too small for {len(SPECIALS)} special tokens and 256 bytes; take at least "
            f"{SMALLEST_VOCAB}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((_LONG_WORD.sub(r"\g<0> ", text) for text in texts), trainer)
    return _plain_specials(tokenizer)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Reads a tokenizer that `fit_tokenizer` made. Raises DataError if the file is missing, damaged, or lacks one of the
    special tokens."""
    tokenizer = read_tokenizer(path)
    missing = [token for token in SPECIALS if tokenizer.token_to_id(token) is None]
    if missing:
        raise DataError(f"tokenizer {str(path)!r} lacks {', '.join(missing)}; use one written by prepare-data")
    return _plain_specials(tokenizer)


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """Returns the token ids of each text, int64, without special tokens before or after the text."""
    with tokenizer_errors("the tokenizer fails on a text; give another one"):
        encoded = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return [np.array(found.ids, np.int64) for found in encoded]


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Returns the id of each special token. `fit_tokenizer` and `load_tokenizer` guarantee that all of them exist."""
    return {token: found for token in SPECIALS if (found := tokenizer.token_to_id(token)) is not None}


def _plain_specials(tokenizer: Tokenizer) -> Tokenizer:
    # Encodes a literal "<eos>" in a text as plain text, so that it does not end the document. tokenizer.json lacks this
    # option.
    tokenizer.encode_special_tokens = True
    return tokenizer
