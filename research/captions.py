"""Data and judgement of the demonstration `configs/vision_text_tiny_cpu.yaml`: captions of pictures in five languages.

`prepare` writes a tiny model in ERNIE-4.5-VL's form with random weights, renderings of OpenMoji pictures, and conversations
about them. `sheet` draws captions that the exported model writes. `judge` measures the exported model with transformers
alone. It compares the loss of captions behind their own pictures with the loss behind the pictures of other captions, and
with the loss of a model that was trained with pictures of noise, which say nothing.
"""

import json
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image, ImageDraw, ImageFont
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from moe_dist.data.corpus_packages import LANGUAGES, openmoji
from moe_dist.data.pictures import BACKGROUNDS, rasterise

CONFIG = Path(__file__).parents[1] / "configs" / "vision_text_tiny_cpu.yaml"
SEEN, UNSEEN, RENDERS, SIDE, PATCH, MERGE = 48, 40, 100, 64, 8, 2
PLACEHOLDERS = (SIDE // PATCH // MERGE) ** 2  # tokens of a picture
# Their ids are 0, 1, 2, ..., as in the configuration.
MARKS = ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|image|>", "<|video|>", "<|begin_image|>", "<|end_image|>")
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message.role + '|>' }}"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content + '<|end|>' }}{% endgeneration %}"
    "{% elif message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}"
    "{{ '<|begin_image|><|image|><|end_image|>' if part.type == 'image' else part.text }}"
    "{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True)
class Caption:
    """A caption of a picture file, in one language."""

    icon: str
    language: str
    text: str
    picture: str  # path of the file, relative to the folder of the demonstration


def prepare(folder: Path, *, seed: int = 0) -> None:
    """Writes `model/`, `pictures/`, `data.jsonl`, `noise.jsonl`, `seen.json` and `unseen.json` into `folder`."""
    rng = np.random.default_rng(seed)
    by_family = {picture.family: picture for picture in openmoji().items if len(picture.captions) == len(LANGUAGES)}
    chosen = rng.permutation(sorted(by_family))[: SEEN + UNSEEN].tolist()
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    found: dict[str, list[Caption]] = {"train": [], "seen": [], "unseen": []}
    for number, family in enumerate(chosen):
        icon = by_family[family]
        raster = Image.fromarray(rasterise(icon.path, svg=True))
        names = dict(caption.split(": ", 1) for caption in icon.captions)
        sides = ["train"] * RENDERS + ["seen"] * len(LANGUAGES) if number < SEEN else ["unseen"] * len(LANGUAGES)
        for index, side in enumerate(sides):
            language = LANGUAGES[(index + number) % len(LANGUAGES)]
            path = f"pictures/{icon.key}-{index}.png"
            _rendering(raster, rng).save(folder / path)
            found[side].append(Caption(icon.key, language, names[language], path))
    order = rng.permutation(len(found["train"])).tolist()
    _write_lines(folder / "data.jsonl", [_row(found["train"][number]) for number in order])
    blind = [replace(found["train"][number], picture=f"pictures/noise-{number}.png") for number in order]
    for each in blind:
        Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)).save(folder / each.picture)
    _write_lines(folder / "noise.jsonl", [_row(each) for each in blind])
    for side in ("seen", "unseen"):
        (folder / f"{side}.json").write_text(json.dumps([vars(each) for each in found[side]], ensure_ascii=False))
    _write_model(folder / "model", [each.text for each in found["train"]], seed)


def _rendering(raster: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Returns an icon of random size and place on a random light background, SIDE x SIDE pixels."""
    side = int(rng.integers(SIDE * 5 // 8, SIDE + 1))
    canvas = Image.new("RGBA", (SIDE, SIDE), (*BACKGROUNDS[rng.integers(len(BACKGROUNDS))], 255))
    at = tuple(rng.integers(0, SIDE - side, size=2, endpoint=True).tolist())
    canvas.alpha_composite(raster.resize((side, side), Image.Resampling.BOX), at)
    return canvas.convert("RGB")


def _row(caption: Caption) -> dict[str, Any]:
    asked = [{"type": "image", "image": caption.picture}, {"type": "text", "text": caption.language}]
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": caption.text}]}


def _write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _write_model(folder: Path, texts: Sequence[str], seed: int) -> None:
    """Writes tokenizer, chat template, image processor and random weights."""
    from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=1024, special_tokens=list(MARKS), initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|pad|>", eos_token="<|end|>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    model = yaml.safe_load(CONFIG.read_text())["model"]
    config = CONFIG_MAPPING[model["family"]](**model["fields"])
    torch.manual_seed(seed)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    size = {"shortest_edge": SIDE * SIDE, "longest_edge": SIDE * SIDE}
    values = {"image_processor_type": "Ernie4_5_VLMoeImageProcessor", "patch_size": PATCH, "merge_size": MERGE}
    (folder / "preprocessor_config.json").write_text(json.dumps({**values, "temporal_patch_size": 1, "size": size}))


class Judge:
    """Measures losses of captions with an exported model, by transformers alone."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

        if not (folder / "config.json").is_file():
            raise SystemExit(f"{folder}: no exported model; write one with moe-dist export-hf (docs/how-to/captions.md)")
        self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self._processor: Any = AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True)
        self._model: Any = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True
        ).eval()

    @torch.no_grad()
    def nats(self, caption: Caption, picture: Path) -> float:
        """Returns the negative log-likelihood of a caption and its end mark, behind a picture."""
        answer = self._tokenizer(f"{caption.text}<|end|>").input_ids
        logits = self._logits(caption, picture, answer)[-len(answer) - 1 : -1]
        return float(torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum"))

    @torch.no_grad()
    def written(self, caption: Caption, picture: Path) -> str:
        """Returns the most likely caption of a picture in the language of `caption`, token by token."""
        found: list[int] = []
        while len(found) < 24 and found[-1:] != [MARKS.index("<|end|>")]:
            found.append(int(self._logits(caption, picture, found)[-1].argmax()))
        return self._tokenizer.decode(found, skip_special_tokens=True)

    def _logits(self, caption: Caption, picture: Path, answer: Sequence[int]) -> Tensor:
        asked = f"<|user|><|begin_image|>{'<|image|>' * PLACEHOLDERS}<|end_image|>{caption.language}<|assistant|>"
        ids = torch.tensor([[*self._tokenizer(asked).input_ids, *answer]])
        more = dict(self._processor(images=[Image.open(picture)], return_tensors="pt"))
        marks = torch.tensor([MARKS.index(mark) for mark in ("<|image|>", "<|begin_image|>", "<|end_image|>")])
        more["moe_mm_token_type_ids"] = torch.isin(ids, marks).long()
        more["mm_token_type_ids"] = (ids == marks[0]).long()
        return self._model(input_ids=ids, **more).logits[0]


def judge(folder: Path, exported: Path, blind_model: Path, *, seed: int = 0) -> list[str]:
    """Returns lines with the nats a caption, and of differences the mean with a bootstrap's 95 % interval over icons."""
    trained, blind, rng = Judge(exported), Judge(blind_model), np.random.default_rng(seed)
    lines = [f"{'captions':24} own picture  another's  no picture  gain over another's    gain over no picture"]
    for side, named in (("seen", "new renderings, seen"), ("unseen", "unseen pictures")):
        captions = [Caption(**each) for each in json.loads((folder / f"{side}.json").read_text())]
        icons = sorted({each.icon for each in captions})
        pictures = {each.icon: folder / each.picture for each in captions}
        others = dict(zip(icons, np.roll(icons, 1).tolist(), strict=True))
        noise = sorted(folder.glob("pictures/noise-*.png"))[: len(captions)]
        nats_3N = np.array(
            [
                [trained.nats(each, folder / each.picture) for each in captions],
                [trained.nats(each, pictures[others[each.icon]]) for each in captions],
                [blind.nats(each, picture) for each, picture in zip(captions, noise, strict=True)],
            ]
        )
        is_of_icon = [[each.icon == icon for each in captions] for icon in icons]
        own, shuffled, none = np.array([nats_3N[:, chosen].mean(1) for chosen in is_of_icon]).T
        gains = [_interval(each - own, rng) for each in (shuffled, none)]
        means = f"{own.mean():11.2f}  {shuffled.mean():9.2f}  {none.mean():10.2f}"
        lines.append(f"{named:24} {means}  {gains[0]:22} {gains[1]}")
    return lines


def _interval(values: np.ndarray, rng: np.random.Generator) -> str:
    draws = values[rng.integers(len(values), size=(2000, len(values)))].mean(1)
    low, high = np.quantile(draws, (0.025, 0.975))
    return f"{values.mean():+.2f} [{low:+.2f}, {high:+.2f}]"


def sheet(folder: Path, exported: Path, *, seed: int = 0) -> Image.Image:
    """Returns new renderings of 12 seen pictures, and in the last row of 6 unseen ones, each with its true caption and with
    the model's. Leaves out Japanese, which the font does not have."""
    trained, rng = Judge(exported), np.random.default_rng(seed)
    canvas = Image.new("RGB", (6 * 150, 3 * 190), "white")
    pen = ImageDraw.Draw(canvas)
    for side, first, count in (("seen", 0, 12), ("unseen", 12, 6)):
        captions = [Caption(**each) for each in json.loads((folder / f"{side}.json").read_text())]
        captions = [each for each in captions if each.language != "ja"]
        for place, number in enumerate(rng.permutation(len(captions))[:count].tolist(), first):
            each, x, y = captions[number], place % 6 * 150, place // 6 * 190
            picture = Image.open(folder / each.picture).resize((128, 128), Image.Resampling.NEAREST)
            canvas.paste(picture, (x + 11, y + 8))
            for line, text in enumerate((each.text, trained.written(each, folder / each.picture))):
                named = f"{each.language}: {text}" if line == 0 else f"model: {text}"
                pen.text((x + 11, y + 142 + 20 * line), named[:24], fill="black", font=ImageFont.load_default(11))
    return canvas


def main(arguments: Sequence[str]) -> None:
    parser = ArgumentParser(prog="python -m research.captions", description=__doc__)
    parser.add_argument("action", choices=("prepare", "judge", "sheet"))
    parser.add_argument("--folder", type=Path, default=Path(".cache/captions"))
    parser.add_argument("--model", type=Path, default=Path(".cache/captions/exported"), help="what export-hf wrote")
    parser.add_argument("--blind", type=Path, default=Path(".cache/captions/exported_noise"))
    given = parser.parse_args(arguments)
    if given.action == "prepare":
        prepare(given.folder)
    elif given.action == "sheet":
        sheet(given.folder, given.model).save(given.folder / "sheet.png")
        print(given.folder / "sheet.png")
    else:
        print("\n".join(judge(given.folder, given.model, given.blind)))


if __name__ == "__main__":
    main(sys.argv[1:])
