"""Trains a small VQ model of transformers (Janus's), which turns pictures into tokens and back. See
docs/how-to/image-tokens.md."""

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from moe_dist.errors import ConfigError, DataError
from moe_dist.runtime.command_line import reports_errors, run_command, takes
from moe_dist.runtime.progress import shown_progress

SHEET = "reconstructions.png"
_SHOWN = 12  # pictures on the sheet


@dataclass(frozen=True)
class TrainOptions:
    pictures: Annotated[
        str, typer.Argument(help="Folder of PNG and JPEG files; `openmoji` takes those of the default data.")
    ]
    out: Annotated[Path, typer.Option(help="Folder to make; it must not exist.")]
    size: Annotated[int, typer.Option(min=16, max=512, help="Pixels of a picture's side.")] = 64
    cells: Annotated[int, typer.Option(min=2, max=64, help="Codes along a side: a picture has cells x cells tokens.")] = 8
    codes: Annotated[int, typer.Option(min=2, max=65536, help="Number of different codes.")] = 512
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 1500
    most: Annotated[int, typer.Option(min=1, help="Largest number of pictures that are read.")] = 20000
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights and batches.")] = 0


@reports_errors("train_image_tokenizer")
@takes(TrainOptions)
def main(options: TrainOptions) -> None:
    """Train an image tokenizer on a CPU, and show what it keeps of pictures."""
    if os.path.lexists(options.out):
        raise ConfigError(f"{options.out} exists; nothing is overwritten: remove it, or choose another folder")
    import numpy as np
    import torch

    from moe_dist.checkpoint.storage import new_folder
    from moe_dist.data.corpus_files import picture_files
    from moe_dist.data.corpus_packages import LANGUAGES, openmoji
    from moe_dist.data.image_tokenizer import ImageTokenizer
    from moe_dist.data.token_pictures import open_picture
    from moe_dist.data.vq_training import PROCESSOR, VQRecipe, make_model, train

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))))
    recipe = VQRecipe(options.size, options.cells, options.codes, steps=options.steps, seed=options.seed)
    damaged: list[DataError] = []
    source = (
        openmoji(LANGUAGES[:1])
        if options.pictures == "openmoji"
        else picture_files("images", Path(options.pictures), "not stated", damaged.append)
    )
    chosen = np.random.default_rng(options.seed).permutation(len(source.items))[: options.most]
    model = make_model(recipe)
    with new_folder(options.out) as folder, shown_progress() as report:
        (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR | {"size": recipe.sides}, indent=1) + "\n")
        model.save_pretrained(folder)
        reader, found = ImageTokenizer(folder), []
        for number, place in enumerate(sorted(chosen.tolist())):
            try:
                found.append(reader.pixels(open_picture(source.items[place].path))["pixel_values"][0].numpy())
            except DataError as error:
                damaged.append(error)
            report("read pictures", number + 1, len(chosen))
        if not found:
            raise DataError(f"{options.pictures}: none of {len(chosen)} pictures can be read; the first: {damaged[0]}")
        pictures_N3SS = torch.from_numpy(np.stack(found))
        train(model, pictures_N3SS, recipe, report)
        model.save_pretrained(folder)
        made = ImageTokenizer(folder)
        shown = sorted(chosen.tolist())[:: max(1, len(chosen) // _SHOWN)][:_SHOWN]
        pairs = [(made.shown(image), made.decode(made.encode(image)[None])[0]) for image in _readable(source, shown)]
        write_sheet(folder / SHEET, pairs)
    for error in damaged[:5]:
        print(f"left out: {error}")
    if len(damaged) > 5:
        print(f"left out: {len(damaged) - 5} more")
    squared = np.mean([np.square(one.astype(float) - other).mean() for one, other in pairs])
    print(f"reconstruction of {len(pairs)} pictures: PSNR {10 * math.log10(255**2 / max(squared, 1e-9)):.1f} dB ({SHEET})")
    print(f"{options.out} is made: {made.codes} codes, {made.grid[0]} x {made.grid[1]} tokens a picture")


def _readable(source: Any, numbers: Sequence[int]) -> Iterator[Any]:
    from moe_dist.data.token_pictures import open_picture

    for number in numbers:
        try:
            yield open_picture(source.items[number].path)
        except DataError:  # told already
            continue


def write_sheet(path: Path, pairs: Sequence[tuple[Any, Any]]) -> None:
    """Writes a PNG with each picture above its reconstruction."""
    import numpy as np
    from PIL import Image

    rows = [np.concatenate(row, axis=1) for row in zip(*pairs, strict=True)]
    Image.fromarray(np.concatenate(rows, axis=0)).save(path)


if __name__ == "__main__":
    run_command(main)
