"""Special tokens of another model's tokenizer get moe_dist's names, and WordNet's verbs come with their glosses."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from moe_dist.data.tokenizer import BOS, EOS, special_ids
from moe_dist.errors import DataError
from research.experiments.words_data import MARKS, renamed, verbs


def content(*marks: str) -> dict[str, Any]:
    vocab = {word: number for number, word in enumerate([*marks, "word"])}
    added = [{"id": vocab[mark], "content": mark, "special": True} for mark in marks]
    return {"added_tokens": added, "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "word"}}


def test_marks_keep_their_ids_under_other_names() -> None:
    before = content("<other>", *MARKS)
    found = renamed(before)
    assert [each["content"] for each in found["added_tokens"]] == ["<other>", *MARKS.values()]
    assert list(found["model"]["vocab"].values()) == list(range(7))
    tokenizer = Tokenizer(WordLevel(found["model"]["vocab"], unk_token="word"))
    assert special_ids(tokenizer)[BOS] == before["model"]["vocab"]["<|endoftext|>"]
    assert special_ids(tokenizer)[EOS] == before["model"]["vocab"]["<|im_end|>"]
    assert before == content("<other>", *MARKS), "unchanged"


def test_a_tokenizer_without_a_mark_is_refused() -> None:
    with pytest.raises(DataError, match=r"lacks <repo_name>, <\|im_end\|>"):
        renamed(content("<|endoftext|>", "<reponame>", "<file_sep>"))


def test_verbs_come_with_their_glosses_and_the_licence_does_not(tmp_path: Path) -> None:
    lines = ["  1 This software and database is | provided", '00305203 30 v 01 give_up 0 000 00 | stop; "She gave up"  ']
    (tmp_path / "data.verb").write_text("\n".join(lines) + "\n")
    assert verbs(tmp_path) == ['give up: stop; "She gave up"']
