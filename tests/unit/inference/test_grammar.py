"""The grammar allows text, and pictures that have exactly the required number of codes."""

import numpy as np
import pytest

from moe_dist.errors import ConfigError
from moe_dist.formats.manifest import Manifest
from moe_dist.inference.grammar import Grammar, GrammarState, grammar_of
from tests.support.messages import refused
from tests.support.tiny import BEGIN_IMAGE, END_IMAGE, EOS, IMAGE_IDS, PAD, TEXT_IDS

CELLS = 16


@pytest.fixture
def manifest(tiny_data: object) -> Manifest:
    from moe_dist.formats.manifest import load_manifest

    return load_manifest(str(tiny_data))


@pytest.fixture
def grammar(manifest: Manifest) -> Grammar:
    return grammar_of(manifest, vocab_size=70, never=[4])


def test_states_allow_what_the_data_hold(grammar: Grammar) -> None:
    allowed = [set(np.flatnonzero(row).tolist()) for row in grammar.allowed_SV]
    text = set(range(*TEXT_IDS)) - {PAD, 4, BEGIN_IMAGE, END_IMAGE}
    assert allowed[GrammarState.TEXT] == text | {BEGIN_IMAGE}
    assert allowed[GrammarState.TEXT_ONLY] == text
    assert allowed[GrammarState.CODE] == set(range(*IMAGE_IDS))
    assert allowed[GrammarState.END_OF_PICTURE] == {END_IMAGE}
    assert EOS in text


def test_a_picture_is_its_codes_and_its_end(grammar: Grammar) -> None:
    tokens = [9]
    states = []
    for token in [BEGIN_IMAGE, *range(48, 48 + CELLS), END_IMAGE, 12]:
        states.append(grammar.state(tokens, 100))
        tokens.append(token)
    assert states == [GrammarState.TEXT, *[GrammarState.CODE] * CELLS, GrammarState.END_OF_PICTURE, GrammarState.TEXT]
    assert [codes.tolist() for codes in grammar.pictures(tokens)] == [list(range(CELLS))]
    assert grammar.text(tokens) == [9, 12]
    assert grammar.state([9], CELLS + 2) is GrammarState.TEXT
    assert grammar.state([9], CELLS + 1) is GrammarState.TEXT_ONLY  # too few positions for a whole picture
    assert grammar.pictures(tokens[:10]) == []


def test_data_without_pictures_have_text_alone(manifest: Manifest) -> None:
    plain = manifest.model_copy(update={"image": None})
    grammar = grammar_of(plain, vocab_size=64)
    assert grammar.state([BEGIN_IMAGE], 100) is GrammarState.TEXT_ONLY
    assert not grammar.allowed_SV[GrammarState.CODE].any()


def test_another_name_for_pictures_is_refused(manifest: Manifest) -> None:
    renamed = manifest.model_copy(update={"modalities": {"text": (TEXT_IDS,), "drawing": (IMAGE_IDS,)}})
    with refused(ConfigError):
        grammar_of(renamed, vocab_size=64)
