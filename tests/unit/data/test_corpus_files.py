"""Sources of a data set are read from a user's own files."""

import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pytest
from PIL import Image
from pyarrow import parquet

from moe_dist.data.corpus_files import instruction_files, picture_files, text_files
from moe_dist.data.tables import raw_rows
from moe_dist.errors import ConfigError, DataError
from tests.support.messages import refused
from tests.support.special_files import reads_little


def test_texts_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/b.md").write_text("zwei ü")
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "copy.txt").write_text("one")
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "binary").write_bytes(b"a\xff\xfe\x00")
    (tmp_path / ".hidden").write_text("no")
    (tmp_path / "photo.png").write_bytes(b"\x89PNG\xff")
    (tmp_path / "photo.txt").write_text("a caption, which goes with its picture")
    with pytest.raises(DataError, match=r"binary: not UTF-8 at byte 1;"):
        text_files("t", tmp_path, "CC0-1.0")
    skipped: list[DataError] = []
    source = text_files("t", tmp_path, "CC0-1.0", skipped.append)
    assert len(skipped) == 1
    assert [(text.key, text.content) for text in source.items] == [
        ("a.txt", "one"),
        ("copy.txt", "one"),
        ("deep/b.md", "zwei ü"),
    ]
    families = [text.family for text in source.items]
    assert families[0] == families[1] != families[2]
    assert source.licence == "CC0-1.0"


def test_texts_of_a_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "one", "id": 3}\n\n{"text": ""}\n{"text": "two"}\n')
    assert [(text.key, text.content) for text in text_files("t", path, "").items] == [("1", "one"), ("4", "two")]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("nonsense", "line 2, column 1: is not JSON"),
        ('{"txt": 1}', "line 2: needs"),
        ("[]", "line 2: is list, not an object"),
        ('{"text": 1}', "is int"),
        ('{"text": "\\ud800 a"}', "line 2: is not JSON"),
        ('{"text": ' + "[" * 100_000, "line 2: is not JSON"),
        ('{"text": ' + "9" * 5000 + "}", "line 2: is not JSON"),
    ],
    ids=lambda each: each[:20],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, words: str) -> None:
    (tmp_path / "t.jsonl").write_text(f'{{"text": "one"}}\n{line}\n')
    with pytest.raises(DataError, match=words):
        text_files("t", tmp_path / "t.jsonl", "")


@pytest.mark.parametrize("name", ["rows.jsonl", "texts/b.log"])
def test_a_file_of_gigabytes_is_refused_before_it_is_read(tmp_path: Path, name: str) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text("hello")
    with (tmp_path / name).open("wb") as stream:
        stream.truncate(6 << 30)  # a sparse file, without blocks on the disk
    with reads_little(), pytest.raises(DataError, match=name):
        text_files("t", tmp_path / name.partition("/")[0], "")


@pytest.mark.parametrize(
    ("column", "words"),
    [
        (pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 20_000, pyarrow.int32()), ["x" * 65_536]), "characters"),
        (pyarrow.nulls(100_000, pyarrow.string()), "rows"),
        (pyarrow.ListArray.from_arrays([0, 20_000_000], pyarrow.nulls(20_000_000, pyarrow.int8())), "1 s of CPU time"),
    ],
    ids=["text", "rows", "row"],
)
def test_a_small_file_with_a_large_table_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, column: pyarrow.Array, words: str
) -> None:
    """Parquet stores equal values of a column once, so a small file can hold a table of 1.3 GB."""
    monkeypatch.setattr("moe_dist.data.tables._FREE_BYTES", 1 << 26)
    monkeypatch.setattr("moe_dist.data.tables._BATCH_SECONDS", 1 if "CPU" in words else 5)
    table = pyarrow.table({"text": column})
    parquet.write_table(table, tmp_path / "t.parquet", compression="zstd", store_schema=False)
    with pytest.raises(DataError, match=f"t.parquet: cannot be read: .* more than .*{words}"):
        for _ in raw_rows("text", tmp_path / "t.parquet"):
            pass


@pytest.mark.parametrize(
    ("size", "headers", "words"),
    [(4 << 30, 1, "header has 4,294,967,296 bytes"), (512, 2000, "recursion"), (1 << 20, 1, "1 s of CPU time")],
    ids=["sparse", "nested", "digits"],
)
def test_a_shard_with_a_hostile_header_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, headers: int, words: str
) -> None:
    monkeypatch.setattr("moe_dist.data.tables._BATCH_SECONDS", 1)
    info = tarfile.TarInfo("x")
    info.size, info.type = size, tarfile.XHDTYPE
    with (tmp_path / "t.tar").open("wb") as stream:
        for _ in range(headers):
            stream.write(info.tobuf())
            stream.write(b"1" * min(size, 1 << 20))  # tarfile searches these digits in quadratic time
        stream.truncate(headers * (512 + size) + 1024)
    with pytest.raises(DataError, match=rf"t\.tar: .*{words}"):
        list(raw_rows("text", tmp_path / "t.tar"))


@pytest.mark.parametrize(
    ("saved", "words"),
    [
        ({"file": "../secret.arrow"}, "names '../secret.arrow', which is not in the folder"),
        ({"texts": ["x" * (1 << 27)]}, "a row has 134,217,740 characters"),
        ({"features": '{"text": {"names_file": "/nowhere/names", "_type": "ClassLabel"}}'}, None),
        ({"pictures": [{"bytes": None, "path": "../secret.png"}]}, None),
    ],
    ids=lambda each: each and next(iter(each)),
)
def test_a_saved_dataset_reads_its_folder_alone(tmp_path: Path, saved: dict[str, Any], words: str | None) -> None:
    folder, columns = tmp_path / "saved", {"text": saved.get("texts", ["hello"])}
    folder.mkdir()
    features = json.dumps({"text": {"dtype": "string", "_type": "Value"}, "image": {"_type": "Image"}})
    if "pictures" in saved:
        columns["image"] = saved["pictures"]
    else:
        features = saved.get("features", features.partition(', "image"')[0] + "}")
    table = pyarrow.table(columns).replace_schema_metadata({"huggingface": f'{{"info": {{"features": {features}}}}}'})
    options = pyarrow.ipc.IpcWriteOptions(compression="zstd")
    for path in (folder / "data.arrow", tmp_path / "secret.arrow"):
        with pyarrow.ipc.new_stream(path, table.schema, options=options) as stream:
            stream.write_table(table)
    state = dict.fromkeys(("fingerprint", "format_columns", "format_type", "split"))
    state |= {
        "data_files": [{"filename": saved.get("file", "data.arrow")}],
        "format_kwargs": {},
        "output_all_columns": False,
    }
    (folder / "state.json").write_text(json.dumps({f"_{key}": value for key, value in state.items()}))
    (folder / "dataset_info.json").write_text(f'{{"features": {features}}}')
    if words is None:  # here the picture and the file of names are not opened
        assert len(text_files("t", folder, "").items) == 1
        return
    with pytest.raises(DataError, match=words):
        text_files("t", folder, "")


def test_pictures_with_and_without_captions(tmp_path: Path) -> None:
    for name, colour in (("a.png", "red"), ("b.JPG", "blue"), ("same.png", "red")):
        Image.new("RGB", (9, 9), colour).save(tmp_path / name)
    (tmp_path / "a.txt").write_text(" a red square\n")
    source = picture_files("p", tmp_path, "")
    assert [(picture.key, picture.captions) for picture in source.items] == [
        ("a.png", ("a red square",)),
        ("b.JPG", ()),
        ("same.png", ()),
    ]
    assert source.items[0].family == source.items[2].family != source.items[1].family


def test_links_out_of_a_folder_are_skipped(tmp_path: Path) -> None:
    """The folder itself may be a link, and a link inside it may name another of its files."""
    real, skipped = tmp_path / "real", []
    real.mkdir()
    for folder in (tmp_path, real):
        (folder / "own.txt").write_text("a secret" if folder == tmp_path else "own")
        Image.new("RGB", (9, 9)).save(folder / "a.png")
    (tmp_path / "data").symlink_to(real)
    for name, target in (("in.md", "own.txt"), ("out.md", "../own.txt"), ("a.txt", "../own.txt"), ("b.png", "../a.png")):
        (real / name).symlink_to(target)
    assert [text.key for text in text_files("t", tmp_path / "data", "", skipped.append).items] == ["in.md", "own.txt"]
    pictures = picture_files("p", tmp_path / "data", "", skipped.append).items
    assert [(picture.key, picture.captions) for picture in pictures] == [("a.png", ())]
    assert len(skipped) == 6
    with refused(DataError, "a link to a file outside of"):
        text_files("t", tmp_path / "data", "")


def test_nothing_there_is_told(tmp_path: Path) -> None:
    with refused(ConfigError):
        text_files("t", tmp_path / "missing", "")
    with refused(ConfigError):
        picture_files("p", tmp_path / "missing", "")
    with refused(ConfigError):
        text_files("t", tmp_path, "")
    with refused(ConfigError):
        picture_files("p", tmp_path, "")


def test_instructions(tmp_path: Path) -> None:
    Image.new("RGB", (9, 9), "red").save(tmp_path / "a.png")
    lines = [
        '{"prompt": "What is it?", "answer": "a square", "image": "a.png"}',
        '{"prompt": "What is it?", "answer": "red", "image": "a.png"}',
        '{"prompt": "Two and two?", "answer": "four", "family": "sums"}',
    ]
    (tmp_path / "i.jsonl").write_text("\n".join(lines))
    first, second, third = instruction_files("i", tmp_path / "i.jsonl", "").items
    assert first.family == second.family != third.family == "sums"
    assert (first.prompt, first.answer, first.image) == ("What is it?", "a square", tmp_path / "a.png")
    assert (third.image, third.side) == (None, "")
    (tmp_path / "copy.png").write_bytes((tmp_path / "a.png").read_bytes())
    (tmp_path / "i.jsonl").write_text(lines[0].replace("a.png", "copy.png"))
    assert instruction_files("i", tmp_path / "i.jsonl", "").items[0].family == first.family


OUTSIDE = ("../x.png", "link.png")  # pictures outside the folder of the JSONL file


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("nonsense", ""),
        ('{"prompt": "a"}', ""),
        ('{"prompt": " ", "answer": "b"}', ""),
        ('{"prompt": "a", "answer": 3}', ""),
        ('{"prompt": "a", "answer": "b", "picture": "c"}', ""),
        *((f'{{"prompt": "a", "answer": "b", "image": "{name}"}}', name) for name in (*OUTSIDE, "c.png", "a.svg")),
        ('{"prompt": "a", "answer": "b", "side": "test"}', ""),
        ('{"prompt": "a", "answer": "b", "side": "train"}', ""),
    ],
)
def test_a_wrong_instruction_is_named(tmp_path: Path, line: str, words: str) -> None:
    for path in (tmp_path.parent / "x.png", tmp_path / "a.svg"):
        Image.new("RGB", (9, 9)).save(path, "png")
    (tmp_path / "link.png").symlink_to(tmp_path.parent / "x.png")
    (tmp_path / "i.jsonl").write_text(f'{{"prompt": "one", "answer": "two"}}\n{line}\n')
    with refused(DataError, words):
        instruction_files("i", tmp_path / "i.jsonl", "")


def test_instructions_without_a_training_side_are_refused(tmp_path: Path) -> None:
    (tmp_path / "i.jsonl").write_text('{"prompt": "a", "answer": "b", "side": "valid"}\n')
    with refused(DataError):
        instruction_files("i", tmp_path / "i.jsonl", "")
    (tmp_path / "i.jsonl").write_text("\n")
    with refused(ConfigError):
        instruction_files("i", tmp_path / "i.jsonl", "")
