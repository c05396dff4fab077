"""Conversations with pictures have the processor's ids, labels and pixels. Tests damaged data, shards and packing."""

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from moe_dist.data.batch import IGNORED
from moe_dist.data.corpus import Recipe
from moe_dist.data.indexed import IndexedSplit
from moe_dist.data.loader import TrainLoader, heldout_batches
from moe_dist.data.picture_files import MOST_PICTURE, read_part
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


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "llava"])
def test_documents_are_those_of_the_processor(tmp_path: Path, family: str) -> None:
    """Each conversation's token ids, labels and pixels equal those that transformers' processor makes of it."""
    from transformers import AutoImageProcessor, AutoTokenizer

    from moe_dist.data.picture_encoder import PictureEncoder

    folder, data = picture_folder(tmp_path / "model", family, weights=False), tmp_path / "data"
    file, plain = rows(tmp_path / "rows", COUNT)
    prepared(data, file, folder)
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
        counts = [int(grid_3.prod()) // 4 for grid_3 in inputs["image_grid_thw"]] if "image_grid_thw" in inputs else []
        for count in counts or [16] * len(images):
            text = text.replace("<|image|>", "<|placeholder|>" * count, 1)
        wanted = tokenizer(text.replace("<|placeholder|>", "<|image|>"), add_special_tokens=False)["input_ids"]
        assert split.tokens(start, length).tolist() == wanted, number
        masks: Any = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        assert int((~split.prompt(start, length)).sum()) == sum(masks["assistant_masks"])
        refs = split.pictures(start)
        assert len(refs) == len(images)
        made_of = [encoder.pixels(data / "pictures", ref) for ref in refs]
        for name in inputs:
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


def _file(image: Any, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def _flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]


def _rotated() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 8  # turned by 90 degrees
    return exif


def _sparse(path: Path) -> None:
    with path.open("wb") as stream:
        stream.truncate(MOST_PICTURE + 1)


WHOLE = picture(np.random.default_rng(0))
RED = Image.new("RGB", (24, 16), "red")
NOISE = np.random.default_rng(1).integers(0, 256, (24, 40, 4)).astype(np.uint8)
FORMAT, OUTSIDE = "not a PNG, JPEG or WEBP", "leads out of the folder"
# What the row's picture is: bytes of its file, a function that makes its file, the row's part, the row, or its line.
DAMAGE: dict[str, tuple[bytes | Callable[[Path], Any] | dict[str, Any] | str, str]] = {
    "missing": (lambda path: None, "No such file"),
    "truncated PNG": (WHOLE[: len(WHOLE) // 2], "damaged"),
    "truncated JPEG": (_file(RED, "JPEG")[:-2], "damaged"),
    "truncated WebP": (_file(RED, "WEBP")[:-2], "damaged"),
    "other byte": (_flipped(WHOLE), "damaged"),
    "only a head": (WHOLE[:33], "damaged"),
    "no picture": (b"<svg/>", FORMAT),
    "animated GIF": (_file(RED, "GIF", save_all=True, append_images=[RED.rotate(90)]), FORMAT),
    "BMP": (_file(RED, "BMP"), FORMAT),
    "TIFF": (_file(RED, "TIFF"), FORMAT),
    "EPS": (_file(RED, "EPS"), FORMAT),
    "PDF": (_file(RED, "PDF"), FORMAT),
    "empty": (b"", FORMAT),
    "zeros": (bytes(len(WHOLE)), FORMAT),
    "no pixel": (WHOLE[:16] + bytes(8) + WHOLE[24:], FORMAT),
    "bomb": (_file(Image.new("1", (10_000, 10_000))), "50,000,000 pixels"),
    "1 x 30,000": (_file(Image.new("1", (30_000, 1))), "aspect ratio"),
    "30,000 x 1": (_file(Image.new("1", (1, 30_000))), "aspect ratio"),
    "too many bytes": (_sparse, "268,435,456 bytes"),
    "link": (lambda path: path.symlink_to("/etc/hostname"), OUTSIDE),
    "link to nothing": (lambda path: path.symlink_to("nothing"), "No such file"),
    "link to itself": (lambda path: path.symlink_to(path.name), "cannot be read"),
    "folder": (Path.mkdir, "is a folder"),
    "FIFO": (os.mkfifo, "is no regular file"),
    "https://x.org/a.png": ({"type": "image", "url": "https://x.org/a.png"}, "nothing is downloaded"),
    "data:": ({"type": "image", "image": "data:image/png;base64,AA"}, "nothing is downloaded"),
    "../a.png": ({"type": "image", "path": "../a.png"}, OUTSIDE),
    "/etc/hostname": ({"type": "image", "path": "/etc/hostname"}, OUTSIDE),
    "long name": ({"type": "image", "path": "x" * 300}, "File name too long"),
    "no name": ({"type": "image"}, "places for pictures: 1, but pictures: 0"),
    "video": ({"type": "video", "video": "a.mp4"}, "only parts of type text and image"),
    "placeholder": ({"type": "text", "text": "<|image|>"}, "placeholders: 1, but pictures: 0"),
    "placeholder of a video": ({"type": "text", "text": "a <|video|> b"}, "videos are not read"),
    "role": ({"conversations": [{"from": ["human"], "value": "x"}]}, "conversations has"),
    "no JSON": ('{"messages": [', "is not JSON"),
}  # fmt: skip
# Files whose pixels are those of their first frame, turned upright, as RGB.
READ: dict[str, tuple[bytes, Image.Image | None]] = {
    "CMYK": (_file(Image.fromarray(NOISE, "CMYK"), "JPEG"), None),
    "16 bits of grey": (
        _file(Image.fromarray(NOISE[..., 0].astype(np.uint16) * 256 + 255)),
        Image.fromarray(NOISE[..., 0]).convert("RGB"),
    ),
    "EXIF": (_file(RED, "JPEG", exif=_rotated()), None),
    "alpha": (_file(Image.fromarray(NOISE)), Image.fromarray(NOISE[..., :3])),
    "JPEG named .png": (_file(RED, "JPEG"), None),
    "animated PNG": (_file(RED, save_all=True, append_images=[RED.rotate(90)]), RED),
    "animated WebP": (_file(RED, "WEBP", lossless=True, save_all=True, append_images=[RED.rotate(90)]), RED),
    "1 bit": (_file(RED.convert("1")), RED.convert("1").convert("RGB")),
}


def _row(part: dict[str, Any]) -> dict[str, Any]:
    """Returns a row with a part, or the row that is given in its place."""
    if "type" not in part:
        return part
    parts = [part, {"type": "text", "text": "cat?"}]
    return {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "two"}]}


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> tuple[Path, list[str]]:
    """The data set of a whole row, the rows of DAMAGE and those of READ, without bad rows; and why those were bad."""
    home = tmp_path_factory.mktemp("spoilt")
    (home / "whole.png").write_bytes(WHOLE)
    lines = [json.dumps(_row({"type": "image", "image": "whole.png"}))]
    for number, spoil in enumerate([each for each, _ in [*DAMAGE.values(), *READ.values()]], 2):
        name = f"{number}.png"
        if isinstance(spoil, bytes):
            (home / name).write_bytes(spoil)
        elif callable(spoil):
            spoil(home / name)
        row = _row(spoil if isinstance(spoil, dict) else {"type": "image", "image": name})
        lines.append(spoil if isinstance(spoil, str) else json.dumps(row))
    (home / "chats.jsonl").write_text("\n".join(lines) + "\n")
    _, skipped = prepared(home / "out", home / "chats.jsonl", folder, skip_bad=True)
    return home, skipped


@pytest.mark.parametrize(("number", "damage"), [*enumerate(DAMAGE)], ids=DAMAGE)
@pytest.mark.timeout(120)
def test_a_bad_row_is_named_and_skipped_if_asked(spoilt: tuple[Path, list[str]], number: int, damage: str) -> None:
    """Its place, its file if it has one, and the reason."""
    spoil, reason = DAMAGE[damage]
    _, skipped = spoilt
    assert len(skipped) == len(DAMAGE)
    assert f"chats.jsonl, line {number + 2}" in skipped[number]
    assert reason in skipped[number]
    assert isinstance(spoil, dict | str) or f"{number + 2}.png" in skipped[number]


def test_bad_rows_end_the_command_unless_asked(spoilt: tuple[Path, list[str]], folder: Path, tmp_path: Path) -> None:
    home, skipped = spoilt
    with pytest.raises(DataError, match="--skip-bad") as raised:
        prepared(tmp_path / "out", home / "chats.jsonl", folder)
    named = raised.value.problems
    assert len(named) == 10
    assert list(named[:-1]) == skipped[:9]


def test_pictures_of_odd_forms_are_read(spoilt: tuple[Path, list[str]]) -> None:
    from moe_dist.data.picture_encoder import PictureEncoder

    home, _ = spoilt
    split = IndexedSplit(home / "out", load_manifest(home / "out").sources["messages"].train)
    assert len(split.starts_D) == 1 + len(READ)
    encoder: Any = PictureEncoder(home / "out")
    for start, (kind, (content, wanted)) in zip(split.starts_D[1:].tolist(), READ.items(), strict=True):
        (ref,) = split.pictures(start)
        image = wanted or ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
        found = encoder.pixels(home / "out/pictures", ref)["pixel_values"]
        assert (ref.height, ref.width) == (image.height, image.width), kind
        assert torch.equal(found, encoder._processor(images=[image], return_tensors="pt")["pixel_values"]), kind


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


def test_a_folder_of_two_models_is_refused(three: Path, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "mixed")
    file = tmp_path / "mixed/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "image_token_id": 151655}))
    with refused(DataError, "config.json", "151655", "two models", golden=False):
        prepared(tmp_path / "out", three, tmp_path / "mixed")
