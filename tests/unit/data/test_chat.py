"""prepare_data reads conversations from every file format. Tokens and labels equal transformers', and bad input is
refused."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_dist.data import chat_rows
from moe_dist.data.chat import HubTokenizer
from moe_dist.data.corpus import Recipe
from moe_dist.data.indexed import IndexedSplit
from moe_dist.data.prepare import Inputs, prepare
from moe_dist.errors import ConfigError, DataError
from moe_dist.formats.manifest import Manifest
from tests.support.chat_folders import CHATML, KINDS, TOOLS, chat_folder, conversations, write_lines
from tests.support.cover import rest_full
from tests.support.invoked import invoke
from tests.support.messages import refused
from tools.prepare_data import main

ROWS = conversations(1000)
MARKS = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
SHORT = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "runs"}]
Pairs = list[tuple[list[int], list[int]]]


def silent(stage: str, done: int, total: int) -> None:
    pass


def made(folder: Path, tokenizer: Path, *, recipe: dict[str, Any] | None = None, **inputs: Any) -> Manifest:
    settings = Recipe(tokenizer=str(tokenizer), **{"val_fraction": 0.0, **(recipe or {})})
    return prepare(folder, Inputs(**inputs), settings, silent)[0]


def stored(folder: Path, manifest: Manifest, source: str = "messages", side: str = "train") -> Pairs:
    """Returns token ids and label mask of each document."""
    data = IndexedSplit(folder, getattr(manifest.sources[source], side))
    places = list(zip(data.starts_D.tolist(), data.lengths_D.tolist(), strict=True))
    return [(data.tokens(*place).tolist(), (~data.prompt(*place)).astype(int).tolist()) for place in places]


def theirs(tokenizer: Path, rows: list[dict[str, Any]]) -> Pairs:
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(tokenizer)
    pairs = []
    for row in rows:
        tools = row.get("tools")
        encoded = found.apply_chat_template(
            row["messages"],
            tools=json.loads(tools) if isinstance(tools, str) else tools,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        pairs.append((encoded["input_ids"], encoded["assistant_masks"]))
    return pairs


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    return {kind: chat_folder(root / kind, kind) for kind in KINDS}


@pytest.mark.parametrize("kind", rest_full(KINDS))
@pytest.mark.slow
def test_a_thousand_conversations_are_transformers_own(tmp_path: Path, folders: dict[str, Path], kind: str) -> None:
    lines = write_lines(tmp_path / "lines.jsonl", ROWS)
    found = stored(tmp_path / "set", made(tmp_path / "set", folders[kind], messages=str(lines)))
    assert found == theirs(folders[kind], ROWS)
    shares = [sum(mask) / len(mask) for _, mask in found]
    assert 0.0 < min(shares) < max(shares) < 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_without_generation_blocks_turns_give_the_same_labels(tmp_path: Path, folders: dict[str, Path], kind: str) -> None:
    (tmp_path / "bare.jinja").write_text(MARKS.sub("", KINDS[kind][2]))
    marked, turns = HubTokenizer(folders[kind]), HubTokenizer(folders[kind], str(tmp_path / "bare.jinja"))
    for row in ROWS[:100]:
        (one,), (other,) = marked.conversation(row, "").documents, turns.conversation(row, "").documents
        assert one.tokens.tolist() == other.tokens.tolist()
        assert one.prompt.tolist() == other.prompt.tolist()


def test_tables_of_datasets_give_what_their_rows_give(tmp_path: Path, folders: dict[str, Path]) -> None:
    """In a table each message has all keys. Keys that a message lacks have the value None."""
    import datasets

    rows = [{**row, "tools": row.get("tools") and json.dumps(TOOLS)} for row in conversations(40)]
    expected = theirs(folders["headers"], rows)
    table = datasets.Dataset.from_list(rows)
    assert "tool_calls" in table[0]["messages"][0]
    table.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "saved" / "cache-1.arrow").write_bytes(b"")  # `map` of datasets leaves such cache files
    (tmp_path / "hub").mkdir()
    for shard in range(2):
        table.shard(2, shard, contiguous=True).to_parquet(str(tmp_path / f"hub/train-0000{shard}-of-00002.parquet"))
    for form in ("saved", "hub"):
        manifest = made(tmp_path / f"set {form}", folders["headers"], messages=str(tmp_path / form))
        assert stored(tmp_path / f"set {form}", manifest) == expected
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(str(tmp_path / "both"))
    table.to_parquet(str(tmp_path / "hub/test-00000-of-00001.parquet"))
    for form in ("both", "hub"):
        with refused(ConfigError, "--messages", "test, train"):
            made(tmp_path / "none", folders["headers"], messages=str(tmp_path / form))
    one = tmp_path / "hub/train-00000-of-00002.parquet"
    assert stored(tmp_path / "half", made(tmp_path / "half", folders["headers"], messages=str(one))) == expected[:20]


@pytest.mark.parametrize("kind", KINDS)
def test_texts_end_with_the_end_token(tmp_path: Path, folders: dict[str, Path], kind: str) -> None:
    import datasets
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folders[kind])
    rows = [{"text": message["content"]} for row in ROWS[:50] for message in row["messages"] if message["content"].strip()]
    write_lines(tmp_path / "lines.jsonl", rows)
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "rows.parquet"))
    expected = [(ids := [*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id], [1] * len(ids)) for row in rows]
    for form in ("lines.jsonl", "rows.parquet"):
        manifest = made(tmp_path / f"set {form}", folders[kind], text=str(tmp_path / form))
        assert stored(tmp_path / f"set {form}", manifest, "text") == expected
    special = HubTokenizer(folders[kind]).text(f"a {tokenizer.eos_token} b", "row 1").tokens.tolist()
    # In text, only a Unigram model recognises its special tokens, because they are among its pieces.
    assert special.count(tokenizer.eos_token_id) == (2 if kind == "instruct" else 1)


def test_equal_questions_are_on_one_side(tmp_path: Path, folders: dict[str, Path]) -> None:
    rows = [{"messages": [SHORT[0] | {"content": f"the {n % 20}"}, SHORT[1] | {"content": f"a {n}"}]} for n in range(200)]
    lines = write_lines(tmp_path / "lines.jsonl", rows)
    manifest = made(tmp_path / "set", folders["chatml"], messages=str(lines), recipe={"val_fraction": 0.2})
    sides = [stored(tmp_path / "set", manifest, side=side) for side in ("train", "valid")]
    asked = [{tuple(np.array(ids)[: mask.index(1)].tolist()) for ids, mask in side} for side in sides]
    assert [len(each) for each in asked] == [16, 4]
    assert not asked[0] & asked[1]
    assert set(manifest.baselines) == {"text/unigram", "text/left_bigram"}


def test_the_command_needs_no_manifest_by_hand(tmp_path: Path, folders: dict[str, Path], monkeypatch) -> None:
    write_lines(tmp_path / "lines.jsonl", ROWS[:20])
    monkeypatch.chdir(tmp_path)
    invoke(main, "--tokenizer", folders["plain"], "--messages", "lines.jsonl", code=0)
    assert (tmp_path / ".cache/data/messages/manifest.json").is_file()


ESCAPES = {
    "attribute": "{{ messages.__class__.__mro__ }}",
    "method": "{{ ''.__class__.__base__.__subclasses__() }}",
    "mutation": "{% set _ = messages.append(1) %}",
    "format": "{{ '{0.__class__}'.format(messages) }}{{ cycler.__init__.__globals__ }}",
}


@pytest.mark.parametrize("escape", ESCAPES)
def test_a_template_that_leaves_its_sandbox_is_refused(tmp_path: Path, folders: dict[str, Path], escape: str) -> None:
    for marks in ("", "{% generation %}a{% endgeneration %}"):
        (tmp_path / "template.jinja").write_text(ESCAPES[escape] + marks)
        hub = HubTokenizer(folders["chatml"], str(tmp_path / "template.jinja"))
        with refused(ConfigError, "--tokenizer", "sandbox", "--chat-template", golden=False):
            hub.conversation({"messages": SHORT}, "lines.jsonl, line 1")


def test_a_template_of_megabytes_is_refused_before_it_is_compiled(tmp_path: Path, folders: dict[str, Path]) -> None:
    hostile = shutil.copytree(folders["chatml"], tmp_path / "hostile")
    (hostile / "chat_template.jinja").write_text("{{ messages }}" * 80_000)
    with refused(DataError, "chat_template.jinja: 1,120,000 bytes", golden=False):
        HubTokenizer(hostile)


TEMPLATES = {
    "no template": ("{% generation %}{% if %}", ConfigError, "is no valid jinja template"),
    "raises": ("{{ raise_exception('roles must alternate') }}", DataError, "roles must alternate"),
    "wrong type": ("{{ messages[0].content + 1 }}", DataError, "TypeError"),
    "endless": ("{% for _ in range(10 ** 9) %}{% endfor %}", DataError, "OverflowError"),
    "all turns differ": ("{% for m in messages %}{{ loop.length }}{{ m.content }}{% endfor %}", DataError, "messages.3"),
    "answers left out": ("{% generation %}{% endgeneration %}{{ messages[0].content }}", DataError, "no token"),
}  # fmt: skip


@pytest.mark.parametrize("case", TEMPLATES)
def test_a_template_that_fails_is_refused(tmp_path: Path, folders: dict[str, Path], case: str) -> None:
    template, error, said = TEMPLATES[case]
    (tmp_path / "template.jinja").write_text(template)
    hub = HubTokenizer(folders["chatml"], str(tmp_path / "template.jinja"))
    with refused(error, said, "--chat-template" if case != "answers left out" else "remove the row"):
        hub.conversation({"messages": SHORT + SHORT}, "lines.jsonl, line 7")


BOMBS = {
    "loops": "{% for _ in range(99999) %}" * 3 + "{% endfor %}" * 3,
    "power": "{{ 9 ** (9 ** (messages|length + 5)) }}",
}


@pytest.mark.parametrize("bomb", rest_full(BOMBS))
def test_a_template_without_an_end_is_stopped(
    tmp_path: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, bomb: str
) -> None:
    """A template that never ends on row 7 is stopped, and the error names the row, the limit in seconds, and the fix."""
    monkeypatch.setattr(chat_rows, "BATCH_SECONDS", 1)
    (tmp_path / "template.jinja").write_text(f"{{% if messages|length > 2 %}}{BOMBS[bomb]}{{% endif %}}{CHATML}")
    rows = [{"messages": SHORT}] * 6 + [{"messages": SHORT + SHORT}]
    lines = str(write_lines(tmp_path / "lines.jsonl", rows))
    template = {"chat_template": str(tmp_path / "template.jinja")}
    with refused(ConfigError, "lines.jsonl, line 7", "more than 1 s", "--chat-template FILE", "remove the row"):
        made(tmp_path / "set", folders["chatml"], messages=lines, recipe=template)


def blown_up() -> dict[str, Any]:
    """Returns a normaliser that expands one letter to 10 GB of text."""
    replace = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 100}
    return {"normalizer": {"type": "Sequence", "normalizers": [replace] * 5}}


def panicking() -> dict[str, Any]:
    """Returns a pattern whose matching never ends, so that the Rust code of tokenizers panics."""
    pattern = {"Regex": "^(([a-z])+.)+[A-Z]([a-z])+$|(x+x+)+y"}
    return {"pre_tokenizer": {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}}


@pytest.mark.parametrize("spoil", [blown_up, panicking])
@pytest.mark.slow
def test_a_hostile_tokenizer_ends_no_more_than_its_row(
    tmp_path: Path, folders: dict[str, Path], spoil: Callable[[], dict[str, Any]]
) -> None:
    hostile = shutil.copytree(folders["plain"], tmp_path / "hostile")
    path = hostile / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | spoil()))
    lines = write_lines(tmp_path / "lines.jsonl", [{"text": "b"}, {"text": "a" + "x" * 40_000}])
    with refused((ConfigError, DataError), "lines.jsonl, line 2", golden=False):  # pyright: ignore[reportArgumentType]
        made(tmp_path / "set", hostile, text=str(lines))


def test_a_template_that_takes_all_memory_is_refused(tmp_path: Path, folders: dict[str, Path]) -> None:
    (tmp_path / "template.jinja").write_text("{% set x = 'a' * 9000000000 %}{{ x }}" + CHATML)
    lines = write_lines(tmp_path / "lines.jsonl", [{"messages": SHORT}])
    with refused(DataError, "lines.jsonl, line 1", "MemoryError", "--chat-template FILE", golden=False):
        made(
            tmp_path / "set",
            folders["chatml"],
            messages=str(lines),
            recipe={"chat_template": str(tmp_path / "template.jinja")},
        )


def nested(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


CONVERSATIONS: dict[str, Any] = {
    "no messages": {"text": "a"},
    "no list": {"messages": "a"},
    "empty": {"messages": []},
    "no role": {"messages": [{"content": "a"}]},
    "no assistant": {"messages": SHORT[:1]},
    "picture": {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}, SHORT[1]]},
    "tools": {"messages": SHORT, "tools": "[1"},
    "tools of no objects": {"messages": SHORT, "tools": "[1]"},
    "nested": {"messages": [SHORT[0] | {"extra": nested(600)}, SHORT[1]]},
}


@pytest.mark.parametrize("case", CONVERSATIONS)
def test_a_malformed_conversation_is_refused(tmp_path: Path, folders: dict[str, Path], case: str) -> None:
    lines = write_lines(tmp_path / "lines.jsonl", [{"messages": SHORT}, CONVERSATIONS[case]])
    with refused(DataError, "lines.jsonl, line 2", *(word for word in ("tools", "nested") if word in case)):
        made(tmp_path / "set", folders["chatml"], messages=str(lines))
    assert not (tmp_path / "set").exists()


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path: Path, folders: dict[str, Path]) -> None:
    from transformers import AutoTokenizer

    lines = str(write_lines(tmp_path / "lines.jsonl", [{"messages": SHORT}]))
    small = chat_folder(tmp_path / "small", "chatml")
    (small / "config.json").write_text('{"vocab_size": 100}')
    with refused(DataError, "vocab_size=100", "another model's"):
        made(tmp_path / "set", small, messages=lines)
    (small / "config.json").write_text('{"vocab_size": 4096}')  # models often have more embedding rows than ids
    assert made(tmp_path / "set", small, messages=lines).vocab_size < 4096
    endless = AutoTokenizer.from_pretrained(folders["chatml"])
    endless.eos_token = None
    endless.save_pretrained(tmp_path / "endless")
    with refused(ConfigError, "eos_token is null"):
        made(tmp_path / "other", tmp_path / "endless", messages=lines)
    silent_one = AutoTokenizer.from_pretrained(folders["chatml"])
    silent_one.chat_template = None
    silent_one.save_pretrained(tmp_path / "silent")
    with refused(ConfigError, "no chat template", "--chat-template"):
        made(tmp_path / "other", tmp_path / "silent", messages=lines)
    (tmp_path / "empty").mkdir()
    with refused(DataError, "--tokenizer", golden=False):
        made(tmp_path / "other", tmp_path / "empty", messages=lines)


def test_a_tokenizer_with_code_is_not_run(tmp_path: Path) -> None:
    folder = chat_folder(tmp_path / "coded", "chatml")
    values = json.loads((folder / "tokenizer_config.json").read_text())
    values |= {"auto_map": {"AutoTokenizer": [None, "planted.Planted"]}, "tokenizer_class": "Planted"}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    (folder / "planted.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Planted: pass\n")
    with refused(DataError, "--tokenizer", golden=False):
        HubTokenizer(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("options", "inputs", "said"),
    [
        ({"tokenizer": None}, {"messages": "lines.jsonl"}, "--tokenizer FOLDER"),
        ({"tokenizer": None, "chat_template": "t"}, {"text": "lines.jsonl"}, "--chat-template t"),
        ({"codes": 3}, {"messages": "lines.jsonl", "images": "x"}, "--images, --codes"),
        ({}, {}, "--messages or --text"),
        ({}, {"messages": "lines.jsonl", "extra_text": {"messages": "x"}}, "reserved"),
        ({}, {"messages": "missing.jsonl"}, "no such file"),
        ({}, {"messages": "empty.jsonl"}, "holds no row"),
        ({"chat_template": "missing"}, {"messages": "lines.jsonl"}, "--chat-template missing"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    tmp_path: Path, folders: dict[str, Path], monkeypatch, options: dict[str, Any], inputs: dict[str, Any], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_lines(Path("lines.jsonl"), [{"messages": SHORT}])
    Path("empty.jsonl").touch()
    with refused(ConfigError, said):
        prepare(Path("set"), Inputs(**inputs), Recipe(**{"tokenizer": str(folders["chatml"]), **options}), silent)
    assert not Path("set").exists()
