"""Generates with a trained model: continues text, draws pictures from captions, describes pictures. See
docs/generation.md."""

import io
import json
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image, ImageDraw, ImageFont

from moe_dist.errors import ConfigError, printable
from moe_dist.inference.generate import Generator, Request, Sampling, check_lengths
from moe_dist.inference.loaded_run import RunOptions, causal_problems, choose_device
from moe_dist.inference.vocabulary import HeldoutPicture, Vocabulary, png
from moe_dist.runtime.command_line import reports_errors, run_command, takes

_SIDE, _GAP, _LINE, _LINES = 96, 12, 13, 3  # sizes in pixels; _LINES is the largest number of lines of a caption
_WIDTH = 16  # largest number of characters of a caption's line, per picture of the entry


@dataclass(frozen=True)
class Task:
    """The arguments of a `Generator` call. `plain` has the prompts without captions, which only guidance needs."""

    prompts: list[list[int]]
    request: Request
    plain: list[list[int]] | None = None


@dataclass(frozen=True)
class GeneratedSample:
    """The tokens that were generated for one prompt, and their meaning as text and pictures."""

    tokens: list[int]  # ids of the new tokens
    modalities: list[str]  # modality of each new token
    text: str  # text of the new tokens
    pictures: list[Image.Image]  # pictures that the new tokens complete


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(RunOptions):
    prompt: Annotated[str | None, typer.Option(help="Text to continue; with --draw, a caption.")] = None
    draw: Annotated[bool, typer.Option("--draw", help="Draw a picture for the prompt.")] = False
    picture: Annotated[str | None, typer.Option(help="Picture to describe: a file, or a held-out picture's number.")] = None
    sheet: Annotated[Path | None, typer.Option(help="PNG to make: drawings of held-out captions.")] = None
    originals: Annotated[bool, typer.Option("--originals", help="Show the held-out pictures on the sheet, too.")] = False
    captions: Annotated[int, typer.Option(min=1, help="Number of captions on the sheet, drawn by the seed.")] = 40
    starting: Annotated[str, typer.Option(help="Take only captions that start with this text.")] = ""
    samples: Annotated[int, typer.Option(min=1, max=4096, help="Samples of each prompt.")] = 1
    tokens: Annotated[int, typer.Option(min=1, help="Largest number of new tokens in a text or caption.")] = 48
    temperature: Annotated[float, typer.Option(help="Divides the logits; 0 takes the likeliest token.")] = 1.0
    top_p: Annotated[float, typer.Option(help="Draw among the likeliest tokens that reach this probability.")] = 0.95
    guidance: Annotated[float, typer.Option(help="How closely a drawing follows its caption; 1 is without guidance.")] = 1.0
    seed: Annotated[int, typer.Option(min=0, max=(1 << 40) - 1, help="Seed of all draws.")] = 0
    out: Annotated[Path, typer.Option(help="Folder for pictures; pictures in it are kept.")] = Path("generated")
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object for each sample, with its tokens.")] = False

    def check(self) -> None:
        """Raises ConfigError if the options do not select exactly one task."""
        options = {"--prompt": self.prompt, "--picture": self.picture, "--sheet": self.sheet}
        wanted = [name for name, given in options.items() if given is not None]
        given = (" ".join(wanted) or "no --prompt, --picture or --sheet") + " --draw" * self.draw
        if not wanted or ("--sheet" in wanted and len(wanted) > 1) or (self.draw and wanted != ["--prompt"]):
            raise ConfigError(
                f"{given}: give --prompt (text to go on with), --prompt with --draw (a caption to draw), --picture (to be "
                "described; a --prompt begins the caption), or --sheet alone"
            )
        if self.originals and self.sheet is None:
            raise ConfigError("--originals: stands on a sheet; give --sheet as well, or leave it out")


@reports_errors("generate")
@takes(GenerateOptions)
def main(options: GenerateOptions) -> None:
    """Sample from a trained run."""
    options.check()  # checked before the model is loaded, because loading is slow
    device = choose_device(options.device)
    trained = options.find(causal_problems)
    model = trained.config.model
    vocabulary = trained.vocabulary()
    task, labels = _task(options, vocabulary)
    check_lengths(task.prompts, task.request.max_new_tokens, model.max_seq_len)
    _ = vocabulary.grammar  # raises for an unsuitable data set before the slow loading of weights
    generator = trained.generator(trained.load(device), vocabulary)
    samples = _run_task(task, generator, vocabulary)
    if options.sheet is not None:
        _write_sheet(options, options.sheet, labels, samples, vocabulary)
        return
    for number, (label, sample) in enumerate(zip(labels, samples, strict=True), _first_number(options.out)):
        _show(options, label, sample, number)


def _task(options: GenerateOptions, vocabulary: Vocabulary) -> tuple[Task, list[str]]:
    """Returns the task, and for each prompt of the task its text or caption."""
    sampling, text = Sampling(options.temperature, options.top_p), options.prompt or ""
    if options.sheet is not None or options.draw:
        captions = [text]
        if options.sheet is not None:
            captions = choose_captions(vocabulary.heldout(), options.captions, starting=options.starting, seed=options.seed)
        labels = [caption for caption in captions for _ in range(options.samples)]
        return _draw_captions(vocabulary, labels, sampling=sampling, seed=options.seed, guidance=options.guidance), labels
    if options.picture is None:
        prompt, text_only = vocabulary.text_prompt(text), not vocabulary.has_codebook
    else:
        prompt, text_only = vocabulary.caption_prompt(_codes(options.picture, vocabulary), text), True
    request = Request(options.tokens, sampling, options.seed, text_only=text_only)
    return Task([prompt] * options.samples, request), [text] * options.samples


def _draw_captions(
    vocabulary: Vocabulary, captions: Sequence[str], *, sampling: Sampling, seed: int, guidance: float
) -> Task:
    """Makes the task of drawing one picture for each caption. Raises ConfigError or DataError if the tokenizer or the
    codebook of the data set is missing or damaged, or if `guidance` is below 0."""
    if not 0.0 <= guidance < float("inf"):
        raise ConfigError(f"guidance={guidance}: must be 0 (no caption) or more; 1 is the model's own")
    vocabulary.check_draws()
    cells = vocabulary.grammar.cells
    prompts = [vocabulary.drawing_prompt(caption) for caption in captions]
    # With guidance 1 the prompts without captions have no effect.
    plain = None if guidance == 1.0 else [vocabulary.drawing_prompt("")] * len(prompts)
    return Task(prompts, Request(cells + 1, sampling, seed, one_picture=True, guidance=guidance), plain)


def choose_captions(heldout: Sequence[HeldoutPicture], count: int, *, starting: str, seed: int) -> list[str]:
    """Returns `count` distinct random captions of `heldout`, or all if there are fewer, in the order of the data. Raises
    ConfigError if no caption begins with `starting`."""
    known = [each for each in dict.fromkeys(each.caption for each in heldout) if each.startswith(starting)]
    if not known:
        raise ConfigError(
            f"--starting {starting!r}: none of the held-out captions does; one of them is {heldout[0].caption!r}"
        )
    chosen = np.random.default_rng(seed).permutation(len(known))[:count]
    return [known[number] for number in sorted(chosen.tolist())]


def _codes(picture: str, vocabulary: Vocabulary) -> np.ndarray:
    """Returns the codes of a picture file, or of the held-out picture with a given number."""
    if not picture.isdecimal() or Path(picture).is_file():
        return vocabulary.read_picture(Path(picture))
    heldout = vocabulary.heldout()
    if int(picture) >= len(heldout):
        raise ConfigError(f"--picture {picture}: there are {len(heldout)} held-out pictures, 0 to {len(heldout) - 1}")
    print(f"held-out picture {picture}, whose caption is {heldout[int(picture)].caption!r}", file=sys.stderr)
    return heldout[int(picture)].codes


def _run_task(task: Task, generator: Generator, vocabulary: Vocabulary) -> list[GeneratedSample]:
    """Generates one sample per prompt, in the order of the prompts."""
    grammar = vocabulary.grammar
    made = generator(task.prompts, task.request, plain=task.plain)
    samples = []
    for prompt, tokens in zip(task.prompts, made, strict=True):
        before = len(grammar.pictures(prompt))
        codes = grammar.pictures([*prompt, *tokens])[before:]
        samples.append(
            GeneratedSample(
                tokens=tokens,
                modalities=[grammar.modalities[grammar.modality_of_id[token]] for token in tokens],
                text=vocabulary.text(tokens),
                pictures=[vocabulary.drawn(each) for each in codes],
            )
        )
    return samples


def _show(options: GenerateOptions, label: str, sample: GeneratedSample, number: int) -> None:
    files = [options.out / f"sample_{number}_{index}.png" for index in range(len(sample.pictures))]
    for file, picture in zip(files, sample.pictures, strict=True):
        _write(file, png(picture))
    if options.as_json:
        record = {"prompt": label, "text": sample.text, "pictures": [str(file) for file in files]}
        print(json.dumps({**record, "tokens": sample.tokens, "modalities": sample.modalities}))
        return
    if not options.draw:
        text = f"{label}{sample.text}"
        print(printable(text, most=len(text)))  # a foreign tokenizer's tokens may contain terminal commands
    for file in files:
        print(f"{file}: {label}" if options.draw else file)


def _first_number(folder: Path) -> int:
    """Returns the first number above the numbers of existing picture files, so that existing pictures are kept."""
    numbers = (path.name.split("_")[1] for path in folder.glob("sample_*_*.png"))
    return max((int(number) + 1 for number in numbers if number.isdecimal()), default=0)


def _write_sheet(
    options: GenerateOptions, path: Path, labels: list[str], samples: list[GeneratedSample], vocabulary: Vocabulary
) -> None:
    """Writes a sheet with one row per caption. A row shows the decoded held-out picture, if requested, and then the
    generated pictures."""
    each, rows = options.samples, []
    originals = {found.caption: found.codes for found in reversed(vocabulary.heldout())} if options.originals else {}
    for first in range(0, len(samples), each):
        pictures = [sample.pictures[0] for sample in samples[first : first + each]]
        if options.originals:
            pictures = [vocabulary.drawn(originals[labels[first]]), *pictures]
        rows.append((labels[first], pictures))
    _write(path, _make_sheet(rows, columns=max(1, 8 // len(rows[0][1]))))
    beside = ", beside the held-out picture" if options.originals else ""
    print(f"{path}: {each} drawings of each of {len(rows)} held-out captions{beside}")


def _make_sheet(rows: Sequence[tuple[str, Sequence[Image.Image]]], *, columns: int) -> bytes:
    """Returns a PNG of entries, with `columns` entries in a row. An entry shows its pictures side by side, and its
    caption below them. All entries have the same number of pictures. The font has only Latin letters."""
    each = len(rows[0][1])
    width, height = each * _SIDE + (each - 1) * 2 + _GAP, _SIDE + _LINES * _LINE + _GAP
    lines = -(-len(rows) // columns)
    canvas = Image.new("RGB", (columns * width + _GAP, lines * height + _GAP), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(11)
    for number, (caption, pictures) in enumerate(rows):
        row, column = divmod(number, columns)
        x, y = _GAP + column * width, _GAP + row * height
        for place, picture in enumerate(pictures):
            enlarged = picture.resize((_SIDE, _SIDE), Image.Resampling.NEAREST)
            canvas.paste(enlarged, (x + place * (_SIDE + 2), y))
        wrapped = textwrap.wrap(caption, _WIDTH * each, max_lines=_LINES, placeholder=" ...")
        pen.text((x, y + _SIDE + 2), "\n".join(wrapped), fill="black", font=font, spacing=1)
    buffer = io.BytesIO()
    # 256 colours make the file small, without a visible difference.
    canvas.quantize(256, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _write(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror or error}; choose another place") from error


if __name__ == "__main__":
    run_command(main)
