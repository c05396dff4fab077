"""Prepares a data set: the default corpus, or your own texts and pictures. See docs/data.md."""

import os
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from moe_dist.data.chat_turns import Turns
from moe_dist.data.corpus import VARIATIONS, HoldOut, Recipe
from moe_dist.data.prepare import RECIPE_FILE, Inputs, prepare, read_recipe
from moe_dist.errors import ConfigError, DataError, printable
from moe_dist.formats.manifest import Manifest
from moe_dist.runtime.command_line import reports_errors, run_command, takes
from moe_dist.runtime.progress import shown_progress

DEFAULT_OUT = Path(".cache/data")
NO_HELD_OUT = "nothing is held out, so runs cannot be evaluated on it: give more documents, or raise --val-fraction"
SHOWN = 5  # largest number of omitted files that the command lists


@dataclass(frozen=True)
class PrepareOptions:
    out: Annotated[
        Path | None,
        typer.Option(help="Folder to make; a finished one is kept. Default: openmoji or messages in .cache/data."),
    ] = None
    text: Annotated[
        str | None,
        typer.Option(help="Your texts: a folder, or a JSONL, parquet or datasets folder with 'text' in each row."),
    ] = None
    messages: Annotated[
        str | None,
        typer.Option(help="Your conversations: a JSONL, parquet or datasets folder with 'messages' in each row."),
    ] = None
    images: Annotated[str | None, typer.Option(help="Your PNG and JPEG files; x.txt is the caption of x.png.")] = None
    extra_text: Annotated[list[str] | None, typer.Option(help="NAME=PATH: a further text source; may be repeated.")] = None
    instructions: Annotated[
        list[str] | None, typer.Option(help="NAME=FILE.jsonl: prompts, and answers to learn; may be repeated.")
    ] = None
    licence: Annotated[str, typer.Option(help="Licence of your own contents, for the manifest.")] = "not stated"
    tokenizer: Annotated[
        str | None, typer.Option(help="A Hugging Face folder, or a tokenizer.json of prepare-data, instead of fitting one.")
    ] = None
    chat_template: Annotated[str | None, typer.Option(help="File with the chat template for --messages.")] = None
    turns: Annotated[
        Turns,
        typer.Option(help="Turns to train where the chat template rewrites earlier ones: each has a document of its own."),
    ] = Recipe.turns
    most_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens that a conversation with pictures may have: data.seq_len of the run.")
    ] = None
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out rows that cannot be encoded; name them.")] = False
    image_tokenizer: Annotated[
        str | None,
        typer.Option(
            help="Folder of a VQ model (Chameleon, Janus, Emu3, or of train-image-tokenizer) that encodes pictures."
        ),
    ] = None
    codebook: Annotated[str | None, typer.Option(help="Use this codebook.npy instead of fitting one.")] = None
    vocab_size: Annotated[int, typer.Option(min=1, help="Number of tokens of the BPE tokenizer.")] = Recipe.vocab_size
    codes: Annotated[int, typer.Option(min=1, max=65536, help="Number of codes of the image codebook.")] = Recipe.codes
    renders: Annotated[int, typer.Option(min=1, help="Renders of each training picture.")] = Recipe.renders
    heldout_renders: Annotated[int, typer.Option(min=1, help="Renders of each held-out picture.")] = Recipe.heldout_renders
    val_fraction: Annotated[float, typer.Option(min=0.0, max=0.9, help="Share that is held out.")] = Recipe.val_fraction
    hold_out: Annotated[
        HoldOut, typer.Option(help="Hold out whole families of pictures, or variants of training pictures.")
    ] = Recipe.hold_out
    vary: Annotated[str, typer.Option(help="Properties in which renders differ; may be empty.")] = ",".join(VARIATIONS)
    caption_first: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of documents with the caption before the picture.")
    ] = Recipe.caption_first
    languages: Annotated[str, typer.Option(help="Languages of the default captions, as en,fr; empty for all.")] = ""
    seed: Annotated[int, typer.Option(min=0, help="Seed of split, renders and codebook.")] = Recipe.seed
    strict: Annotated[bool, typer.Option("--strict", help="End at a file that cannot be read; else leave it out.")] = False


@reports_errors("prepare_data")
@takes(PrepareOptions)
def main(options: PrepareOptions) -> None:
    """Prepare a data set. The default takes a minute: OpenMoji pictures with their names, and Python sources."""
    # Numeric libraries read the variables below when they are imported, which `prepare` does. More threads would only
    # delay the start.
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"):
        os.environ.setdefault(name, str(min(4, os.cpu_count() or 1)))
    make_data_set(options)


def make_data_set(options: PrepareOptions) -> None:
    """Prepares a data set and prints its sources. Raises MoeDistError if an option or input is wrong."""
    began = time.monotonic()
    out = options.out or DEFAULT_OUT / ("openmoji" if options.messages is None else "messages")
    varied = _listed(options.vary)
    if unknown := [each for each in varied if each not in VARIATIONS]:
        raise ConfigError(f"--vary {unknown[0]}: renders differ in some of {','.join(VARIATIONS)}")
    inputs = Inputs(
        text=options.text,
        images=options.images,
        extra_text=dict(_named("--extra-text", entry) for entry in options.extra_text or ()),
        licence=options.licence,
        instructions=dict(_named("--instructions", entry) for entry in options.instructions or ()),
        messages=options.messages,
        languages=_listed(options.languages),
    )
    same = {each.name: getattr(options, each.name) for each in fields(Recipe)}
    recipe = Recipe(**{**same, "vary": tuple(each for each in VARIATIONS if each in varied)})
    skipped: list[DataError] = []
    with shown_progress() as report:
        manifest, built = prepare(out, inputs, recipe, report, _end if options.strict else skipped.append)
    if built:
        _show(manifest)
    for note in read_recipe(out).get("notes", []):
        print(printable(f"note: {note}"))
    for problem in skipped[:SHOWN]:
        print(f"left out: {problem}")
    if len(skipped) > SHOWN:
        print(f"left out: {len(skipped) - SHOWN:,} more; {out / RECIPE_FILE} names them")
    if not built:
        print(f"{out} is finished; nothing to do")
        return
    print(f"{out} made in {time.monotonic() - began:.0f} s")


def _listed(entry: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(each.strip() for each in entry.split(",") if each.strip()))


def _named(option: str, entry: str) -> tuple[str, str]:
    name, equals, path = entry.partition("=")
    if not (name and equals and path):
        raise ConfigError(f"{option} {entry!r}: write it as NAME=PATH")
    return name, path


def _end(error: DataError) -> None:
    """Ends the command at a file that cannot be read. With --strict, this function is the `Skip`."""
    raise DataError(f"{error}, or leave out --strict")


def _show(manifest: Manifest) -> None:
    table = Table("source", "side", "documents", "tokens", *manifest.modalities, title=f"vocabulary {manifest.vocab_size}")
    for name, source in manifest.sources.items():
        for side, split in (("train", source.train), ("valid", source.valid)):
            if split:
                counts = [f"{split.tokens_by_modality[modality]:,}" for modality in manifest.modalities]
                table.add_row(name, side, f"{split.documents:,}", f"{split.tokens:,}", *counts)
    console = Console()
    console.print(table)
    baselines = ", ".join(f"{key} {nats:.2f}" for key, nats in manifest.baselines.items())
    console.print(f"held-out nats a label: {baselines}" if baselines else NO_HELD_OUT)


if __name__ == "__main__":
    run_command(main)
