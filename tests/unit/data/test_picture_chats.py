"""Conversations with pictures have the processor's ids, labels and pixels. Tests damaged data, shards and packing."""

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from moe_dist.data.batch import IGNORED
from moe_dist.data.corpus import Recipe
from moe_dist.data.indexed import IndexedSplit
from moe_dist.data.loader import TrainLoader, heldout_batches
from moe_dist.data.picture_files import read_part
from moe_dist.data.prepare import Inputs, prepare
from moe_dist.data.shards import shard_rows
from moe_dist.errors import ConfigError, DataError, MoeDistError
from moe_dist.formats.manifest import Manifest, load_manifest
from tests.support.messages import refused
from tests.support.picture_chats import picture, picture_folder, rows, shards

COUNT = 60


def prepared(out: Path, messages: Path, tokenizer: Path, **changes: Any) -> tuple[Manifest, list[str]]:
    skipped: list[str] = []
    recipe = Recipe(tokenizer=str(tokenizer), **{"val_fraction": 0.0, **changes})
    prepare(out, Inputs(messages=str(messages)), recipe, lambda *_: None, lambda error: skipped.append(str(error)))
    return load_manifest(out), skipped


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return picture_folder(tmp_path_factory.mktemp("model"), "qwen3_vl_moe", weights=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> tuple[Path, Path, list[dict[str, Any]]]:
    """The data set, the rows' file, and the conversations in the form that transformers reads."""
    root = tmp_path_factory.mktemp("data")
    file, plain = rows(root / "rows", COUNT)
    prepared(root / "out", file, folder)
    return root / "out", file, plain


def loader(data: Path, rank: int = 0, world_size: int = 1, **changes: Any) -> TrainLoader:
    options: dict[str, Any] = {"seq_len": 256, "weights": {}, "pack_window": 64, "seed": 1, "global_batch": 4}
    options |= {"micro_batch": 4 // world_size, **changes}
    return TrainLoader(data, load_manifest(data), rank=rank, world_size=world_size, **options)


def test_documents_are_those_of_the_processor(made: tuple[Path, Path, list[dict[str, Any]]], folder: Path) -> None:
    """Each conversation's token ids, labels and pixels equal those that transformers' processor makes of it."""
    from transformers import AutoImageProcessor, AutoTokenizer

    from moe_dist.data.picture_encoder import PictureEncoder

    plain: Any
    data, _, plain = made
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    processor: Any = AutoImageProcessor.from_pretrained(folder, backend="pil")
    split = IndexedSplit(data, load_manifest(data).sources["messages"].train)
    encoder, counted = PictureEncoder(data), 0
    for number, messages in enumerate(plain):
        start, length = int(split.starts_D[number]), int(split.lengths_D[number])
        paths = [part["path"] for part in messages[0]["content"] if part["type"] == "image"]
        images = [Image.open(path).convert("RGB") for path in paths]
        inputs = processor(images=images, return_tensors="pt") if images else {}
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        for grid_3 in inputs.get("image_grid_thw", ()):
            text = text.replace("<|image|>", "<|placeholder|>" * (int(grid_3.prod()) // 4), 1)
        wanted = tokenizer(text.replace("<|placeholder|>", "<|image|>"), add_special_tokens=False)["input_ids"]
        assert split.tokens(start, length).tolist() == wanted, number
        masks: Any = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        assert int((~split.prompt(start, length)).sum()) == sum(masks["assistant_masks"])
        refs = split.pictures(start)
        assert len(refs) == len(images)
        made_of = [encoder.pixels(data / "pictures", ref) for ref in refs]
        for name in ("pixel_values", "image_grid_thw") if images else ():
            assert torch.equal(torch.cat([each[name] for each in made_of]), inputs[name])
        counted += len(images)
    assert counted > COUNT


def test_shards_give_the_same_documents(
    made: tuple[Path, Path, list[dict[str, Any]]], folder: Path, tmp_path: Path
) -> None:
    data, file, _ = made
    manifest, _ = prepared(tmp_path / "out", shards(tmp_path / "shards", file, 3), folder)
    assert manifest.sources["messages"].train.tokens == load_manifest(data).sources["messages"].train.tokens
    own, other = (IndexedSplit(each, load_manifest(each).sources["messages"].train) for each in (data, tmp_path / "out"))
    order = [number for shard in range(3) for number in range(shard, COUNT, 3)]
    for at, number in enumerate(order):
        start = int(other.starts_D[at])
        assert other.tokens(start, 5).tolist() == own.tokens(int(own.starts_D[number]), 5).tolist()
        found, wanted = other.pictures(start), own.pictures(int(own.starts_D[number]))
        assert [each.digest for each in found] == [each.digest for each in wanted]
    for batch in loader(tmp_path / "out").batches(0):  # decodes from the shards
        assert batch.family_inputs()


def test_ranks_together_read_what_one_rank_reads(made: tuple[Path, Path, list[dict[str, Any]]]) -> None:
    """The order depends on neither ranks nor threads. No sequence exceeds the budget of patches or cuts a picture."""
    data, _, _ = made
    one, most = loader(data, most_patches=300), 300
    sides = [loader(data, rank, 2, most_patches=most) for rank in range(2)]
    for position in range(0, 24, 4):
        (whole,), parts = one.batches(position), [side.batches(position)[0] for side in sides]
        assert torch.equal(whole.tokens_BS, torch.cat([part.tokens_BS for part in parts]))
        wanted: Any = whole.family_inputs()
        for name, each in wanted.items():
            found: list[Any] = [part.family_inputs() for part in parts]
            assert torch.equal(each, torch.cat([more[name] for more in found if name in more]))
        patches = [sum(ref.patches for piece in one.sequence(position + row) for ref in piece.pictures) for row in range(4)]
        assert max(patches) <= most
        placeholders_BS = whole.tokens_BS == load_manifest(data).pictures.token_id  # pyright: ignore[reportOptionalMemberAccess]
        assert placeholders_BS.sum(1).tolist() == [count // 4 for count in patches]
        assert not ((whole.labels_BS == 3) & (whole.labels_BS != IGNORED)).any()
    with refused(ConfigError, "data.most_patches=8", "raise it"):
        loader(data, most_patches=8)
    with refused(ConfigError, "data.seq_len=32", "--most-tokens"):
        loader(data, seq_len=32)


def test_held_out_pictures_are_not_kept(
    made: tuple[Path, Path, list[dict[str, Any]]], folder: Path, tmp_path: Path
) -> None:
    manifest, _ = prepared(tmp_path / "out", made[1], folder, val_fraction=0.3)
    share: dict[str, Any] = {"micro_batch": 2, "rank": 0, "world_size": 1}
    batches = heldout_batches(tmp_path / "out", manifest, source="messages", seq_len=256, sequences=4, **share)
    batch: Any = batches[0]
    assert callable(batch.more)
    assert batch.to("cpu").family_inputs()["pixel_values"].shape[1] == 96


def _png(height: int, width: int) -> bytes:
    stream = io.BytesIO()
    Image.new("1", (width, height)).save(stream, "PNG")
    return stream.getvalue()


WHOLE = picture(np.random.default_rng(0))
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda path: path.unlink(), "No such file"),
    "truncated": (lambda path: path.write_bytes(WHOLE[: len(WHOLE) // 2]), "damaged"),
    "no picture": (lambda path: path.write_bytes(b"<svg/>"), "not a PNG, JPEG or WEBP"),
    "GIF": (lambda path: Image.new("RGB", (9, 9)).save(path, "GIF"), "not a PNG, JPEG or WEBP"),
    "empty": (lambda path: path.write_bytes(b""), "not a PNG, JPEG or WEBP"),
    "bomb": (lambda path: path.write_bytes(_png(10_000, 10_000)), "50,000,000 pixels"),
    "1 x 30,000": (lambda path: path.write_bytes(_png(1, 30_000)), "aspect ratio"),
    "link": (lambda path: (path.unlink(), path.symlink_to("/etc/hostname")), "leads out of the folder"),
    "folder": (lambda path: (path.unlink(), path.mkdir()), "is a folder"),
}


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """A JSONL file of three rows. The second row has the picture b.png, the others have a.png."""
    lines = []
    for name in ("a", "b", "a"):
        parts = [{"type": "image", "image": f"{name}.png"}, {"type": "text", "text": "cat?"}]
        lines.append({"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "two"}]})
        (tmp_path / f"{name}.png").write_bytes(WHOLE)
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_picture_is_named(three: Path, folder: Path, tmp_path: Path, damage: str) -> None:
    spoil, reason = DAMAGE[damage]
    spoil(tmp_path / "b.png")
    with refused(DataError, "chats.jsonl, line 2", "b.png", reason, "--skip-bad"):
        prepared(tmp_path / "out", three, folder)
    manifest, skipped = prepared(tmp_path / "out", three, folder, skip_bad=True)
    assert manifest.sources["messages"].train.documents == 2
    assert len(skipped) == 1
    assert reason in skipped[0]


ROWS = {
    "https://x.org/a.png": ({"type": "image", "url": "https://x.org/a.png"}, "nothing is downloaded"),
    "data:": ({"type": "image", "image": "data:image/png;base64,AA"}, "nothing is downloaded"),
    "../a.png": ({"type": "image", "path": "../a.png"}, "leads out of the folder"),
    "no name": ({"type": "image"}, "places for pictures: 1, but pictures: 0"),
    "video": ({"type": "video", "video": "a.mp4"}, "only parts of type text and image"),
    "placeholder": ({"type": "text", "text": "<|image|>"}, "placeholders: 1, but pictures: 0"),
}


@pytest.mark.parametrize("row", ROWS)
def test_a_row_of_another_form_is_named(three: Path, folder: Path, tmp_path: Path, row: str) -> None:
    part, reason = ROWS[row]
    messages = [{"role": "user", "content": [part]}, {"role": "assistant", "content": "two"}]
    three.write_text(json.dumps({"messages": messages}) + "\n")
    with refused(DataError, "line 1", reason):
        prepared(tmp_path / "out", three, folder)


def test_a_shard_cut_short_ends_the_command(
    made: tuple[Path, Path, list[dict[str, Any]]], folder: Path, tmp_path: Path
) -> None:
    places = shards(tmp_path / "shards", made[1], 2)
    shard = places / "001.tar"
    for size in (shard.stat().st_size // 2, 700, shard.stat().st_size // 1024 * 512):
        shutil.copyfile(shard, places / "copy")
        with shard.open("r+b") as stream:
            stream.truncate(size)
        with refused(MoeDistError, "001.tar"):
            prepared(tmp_path / "out", places, folder)
        (places / "copy").replace(shard)


@pytest.mark.parametrize("size", [-1024, 1 << 40, 1 << 70])
def test_a_shard_with_a_size_outside_is_refused(tmp_path: Path, size: int) -> None:
    shard = tmp_path / "a.tar"
    with tarfile.open(shard, "w", format=tarfile.GNU_FORMAT) as tar:
        for name in ("0.json", "0.png"):
            info = tarfile.TarInfo(name)
            info.size = 512
            tar.addfile(info, io.BytesIO(b"{}".ljust(512)))
    info.size = size  # pyright: ignore[reportPossiblyUnboundVariable]
    with shard.open("r+b") as stream:
        stream.seek(1024)
        stream.write(info.tobuf(tarfile.GNU_FORMAT))
    with refused(DataError, "a.tar", "0.png", "copy it again"):
        list(shard_rows([shard]))


@pytest.mark.parametrize(("name", "length"), [("\ud800.png", None), ("loop.png", None), ("a.png", 1 << 50), ("a.png", -1)])
def test_a_place_of_no_picture_is_refused(three: Path, name: str, length: int | None) -> None:
    (three.parent / "loop.png").symlink_to("loop.png")
    with refused(DataError, "picture", "png", golden=False):
        read_part(three.parent, name, 0, length)


@pytest.mark.parametrize("change", ["other", "gone"])
def test_a_picture_that_changed_since_is_named(three: Path, folder: Path, tmp_path: Path, change: str) -> None:
    prepared(tmp_path / "out", three, folder)
    if change == "gone":
        (tmp_path / "b.png").unlink()
    else:
        (tmp_path / "b.png").write_bytes(WHOLE[:-1] + b"x")
    reason = {"gone": "No such file", "other": "changed since"}[change]
    with refused(DataError, "b.png", "line 2", reason, "prepare the data again"):
        loader(tmp_path / "out", global_batch=4).batches(0)


OK = {"messages": [{"role": "user", "content": "cat?"}, {"role": "assistant", "content": "two"}]}


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [{"from": ["human"], "value": "x"}]},
        {"messages": [{"role": "user", "content": "a <|video|> b"}, {"role": "assistant", "content": "two"}]},
    ],
    ids=["role", "video"],
)
def test_a_row_of_odd_values_is_skipped_if_asked(three: Path, folder: Path, tmp_path: Path, row: dict[str, Any]) -> None:
    three.write_text(json.dumps(row) + "\n" + json.dumps(OK) + "\n")
    _, skipped = prepared(tmp_path / "out", three, folder, skip_bad=True)
    assert len(skipped) == 1


@pytest.mark.parametrize("more", [{"__members__": None}, {"__shard__": 3}, {"image": None}, {"images": None}], ids=str)
def test_conversations_without_pictures_are_data_of_text(
    three: Path, folder: Path, tmp_path: Path, more: dict[str, Any]
) -> None:
    """Such data can also train a model that reads no pictures. Keys of shards have no meaning in a JSONL file."""
    three.write_text("".join(json.dumps(row) + "\n" for row in ({**OK, **more}, OK)))
    manifest, _ = prepared(tmp_path / "out", three, folder)
    assert manifest.pictures is None
    assert set(manifest.modalities) == {"text"}
    assert b"pictures" not in (tmp_path / "out/manifest.json").read_bytes(), "the bytes of earlier versions"


def test_pictures_lie_beside_a_link_to_a_jsonl(three: Path, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    three.rename(tmp_path / "far/x.jsonl")
    three.symlink_to(tmp_path / "far/x.jsonl")
    manifest, _ = prepared(tmp_path / "out", three, folder)
    assert manifest.pictures is not None
