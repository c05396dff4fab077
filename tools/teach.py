"""Writes the most likely next tokens of a teacher model at all positions of a run's training sequences. A run with
`loss.distillation.top_logits` reads these tokens and does not run the teacher. See docs/adapt.md."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from moe_dist.checkpoint.base import content_hash
from moe_dist.checkpoint.contents import open_checkpoint
from moe_dist.checkpoint.directory import find_checkpoint
from moe_dist.data.batch import Batch
from moe_dist.errors import ConfigError
from moe_dist.formats.split_files import data_digest
from moe_dist.inference.loaded_run import choose_device
from moe_dist.model.objective import TeacherOutput
from moe_dist.plan.preflight import check_file
from moe_dist.runtime.command_line import reports_errors, run_command
from moe_dist.runtime.progress import shown_progress
from moe_dist.train.build.training import build_distillation, build_loader
from moe_dist.train.objective.top_logits import TopLogitsManifest, sequence_settings, write_top_logits


@reports_errors("teach")
def main(
    config: Annotated[Path, typer.Argument(help="Configuration of the run, with loss.distillation.teacher.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes of the configuration, key=value.")] = None,
    out: Annotated[Path, typer.Option(help="Folder to make; it must not exist.")] = Path("top-logits"),
    top: Annotated[int, typer.Option(min=1, help="Tokens kept per position; the others are one bucket.")] = 64,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Run a teacher once over the sequences of a run. One process, one device."""
    plan = check_file(config, overrides or ())
    settings, manifest = plan.config, plan.manifest
    section, size = settings.loss.distillation, settings.model.vocab_size
    if section is None or section.teacher is None:
        raise ConfigError("loss.distillation.teacher=null: there is no teacher to run; set it", see="docs/adapt.md")
    if top >= size:
        raise ConfigError(f"--top {top}: must be below model.vocab_size={size}, so that other words remain; lower it")
    steps, drawn = settings.train.steps, settings.train.steps * settings.train.global_batch
    folder = find_checkpoint(Path(section.teacher))
    wanted = TopLogitsManifest(
        teacher=str(folder),
        content=content_hash(open_checkpoint(folder).index),
        vocab_size=size,
        top=top,
        drawn=drawn,
        stored=0,
        sequences=sequence_settings(settings),
        data=data_digest(settings.data.path, manifest),
    )
    loader = build_loader(settings, manifest, rank=0, world_size=1)
    place = choose_device(device)
    teacher = build_distillation(settings, manifest, place).outputs
    with shown_progress() as report:

        def outputs() -> Iterator[tuple[Batch, TeacherOutput]]:
            for step in range(steps):
                for batch in loader.batches(step * settings.train.global_batch):
                    yield batch, teacher(batch.to(place))
                report("teach", step + 1, steps)

        made = write_top_logits(out, outputs(), wanted, seq_len=settings.data.seq_len)
    print(f"{out}: {made.stored} sequences x {settings.data.seq_len} positions x {top} words of {folder}")


if __name__ == "__main__":
    run_command(main)
