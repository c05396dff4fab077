"""The tokenizer restores any text, and produces special tokens only where we insert them."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_dist.data.tokenizer import SMALLEST_VOCAB, SPECIALS, encode_texts, fit_tokenizer, load_tokenizer, special_ids
from moe_dist.errors import ConfigError, DataError
from tests.support.messages import refused

TEXTS = ["def f(x):\n    return x", "de: gitarre", "ja: ギター"] * 20


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back(text: str) -> None:
    tokenizer = fit_tokenizer(TEXTS, vocab_size=300)
    assert tokenizer.decode(encode_texts(tokenizer, [text])[0].tolist(), skip_special_tokens=False) == text


def test_special_tokens_come_first_and_never_from_text(tmp_path: Path) -> None:
    fitted = fit_tokenizer(TEXTS, vocab_size=300)
    assert list(special_ids(fitted)) == list(SPECIALS)
    assert list(special_ids(fitted).values()) == [0, 1, 2, 3, 4]
    fitted.save(str(tmp_path / "t.json"))
    for tokenizer in (fitted, load_tokenizer(tmp_path / "t.json")):
        ids = encode_texts(tokenizer, ["a <eos> b <boi>"])[0]
        assert ids.min() >= len(SPECIALS)
        assert tokenizer.decode(ids.tolist(), skip_special_tokens=False) == "a <eos> b <boi>"


def test_a_text_without_spaces_is_fitted_in_seconds() -> None:
    """A genome is one word. Without a limit of a word's length these letters take half an hour."""
    text = "".join("acgt"[number] for number in np.random.default_rng(0).integers(0, 4, 1_000_000))
    fitted = fit_tokenizer([text], vocab_size=SMALLEST_VOCAB + 20)
    assert fitted.decode(encode_texts(fitted, [text])[0].tolist()) == text


def test_too_small_a_vocabulary_is_refused() -> None:
    with pytest.raises(ConfigError, match=f"vocab_size={SMALLEST_VOCAB - 1}"):
        fit_tokenizer(TEXTS, vocab_size=SMALLEST_VOCAB - 1)


def test_load_refuses_other_files(tmp_path: Path) -> None:
    with refused(DataError):
        load_tokenizer(tmp_path / "missing.json")
    from tokenizers import Tokenizer, models

    Tokenizer(models.BPE()).save(str(tmp_path / "bare.json"))
    with refused(DataError):
        load_tokenizer(tmp_path / "bare.json")
