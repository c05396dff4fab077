"""Generates with a trained model: continues text, draws pictures from captions, describes pictures. See
docs/generation.md."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from moe_dist.errors import ConfigError
from moe_dist.inference.generate import Generator, Request, check_lengths
from moe_dist.inference.loaded_run import RunOptions, causal_problems, choose_device
from moe_dist.inference.sampling import Sampling
from moe_dist.inference.sheet import make_sheet
from moe_dist.inference.tasks import (
    GeneratedSample,
    Task,
    choose_captions,
    draw_captions,
    run_task,
)
from moe_dist.inference.vocabulary import Vocabulary, picture_of, png
from moe_dist.runtime.command_line import reports_errors, run_command, takes


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
    grammar = vocabulary.grammar  # raises for an unsuitable data set, before the weights are loaded, which is slow
    generator = Generator(
        trained.load(device), grammar, group_of_modality=trained.group_of_modality, max_seq_len=model.max_seq_len
    )
    samples = run_task(task, generator, vocabulary)
    if options.sheet is not None:
        _write_sheet(options, options.sheet, labels, samples, vocabulary)
        return
    for number, (label, sample) in enumerate(zip(labels, samples, strict=True), _first_number(options.out)):
        _show(options, label, sample, number)


def _task(options: GenerateOptions, vocabulary: Vocabulary) -> tuple[Task, list[str]]:
    """Returns the task, and the text or caption of each of its prompts."""
    sampling, text = Sampling(options.temperature, options.top_p), options.prompt or ""
    if options.sheet is not None or options.draw:
        captions = [text]
        if options.sheet is not None:
            captions = choose_captions(vocabulary.heldout(), options.captions, starting=options.starting, seed=options.seed)
        labels = [caption for caption in captions for _ in range(options.samples)]
        return draw_captions(vocabulary, labels, sampling=sampling, seed=options.seed, guidance=options.guidance), labels
    if options.picture is None:
        prompt, text_only = vocabulary.text_prompt(text), not vocabulary.has_codebook
    else:
        prompt, text_only = vocabulary.caption_prompt(_codes(options.picture, vocabulary), text), True
    request = Request(options.tokens, sampling, options.seed, text_only=text_only)
    return Task([prompt] * options.samples, request), [text] * options.samples


def _codes(picture: str, vocabulary: Vocabulary) -> np.ndarray:
    """Returns the codes of a picture file, or of the held-out picture with a given number."""
    if not picture.isdecimal() or Path(picture).is_file():
        return vocabulary.read_picture(Path(picture))
    heldout = vocabulary.heldout()
    if int(picture) >= len(heldout):
        raise ConfigError(f"--picture {picture}: there are {len(heldout)} held-out pictures, 0 to {len(heldout) - 1}")
    print(f"held-out picture {picture}, whose caption is {heldout[int(picture)].caption!r}", file=sys.stderr)
    return heldout[int(picture)].codes


def _show(options: GenerateOptions, label: str, sample: GeneratedSample, number: int) -> None:
    files = [options.out / f"sample_{number}_{index}.png" for index in range(len(sample.pictures))]
    for file, picture in zip(files, sample.pictures, strict=True):
        _write(file, png(picture))
    if options.as_json:
        record = {"prompt": label, "text": sample.text, "pictures": [str(file) for file in files]}
        print(json.dumps({**record, "tokens": sample.tokens, "modalities": sample.modalities}))
        return
    if not options.draw:
        print(f"{label}{sample.text}")
    for file in files:
        print(f"{file}: {label}" if options.draw else file)


def _first_number(folder: Path) -> int:
    """Returns the first number above the numbers of existing picture files, so that existing pictures are kept."""
    numbers = (path.name.split("_")[1] for path in folder.glob("sample_*_*.png"))
    return max((int(number) + 1 for number in numbers if number.isdecimal()), default=0)


def _write_sheet(
    options: GenerateOptions, path: Path, labels: list[str], samples: list[GeneratedSample], vocabulary: Vocabulary
) -> None:
    """Writes a sheet with a row for each caption: the decoded held-out picture, if requested, then the generated
    pictures."""
    each, rows = options.samples, []
    originals = {found.caption: found.codes for found in reversed(vocabulary.heldout())} if options.originals else {}
    for first in range(0, len(samples), each):
        pictures = [sample.pictures[0] for sample in samples[first : first + each]]
        if options.originals:
            pictures = [picture_of(originals[labels[first]], vocabulary.codebook), *pictures]
        rows.append((labels[first], pictures))
    _write(path, make_sheet(rows, columns=max(1, 8 // len(rows[0][1]))))
    beside = ", beside the held-out picture" if options.originals else ""
    print(f"{path}: {each} drawings of each of {len(rows)} held-out captions{beside}")


def _write(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror or error}; choose another place") from error


if __name__ == "__main__":
    run_command(main)
