"""Imports a Hugging Face model folder as a checkpoint from which runs can start. See docs/huggingface.md."""

from pathlib import Path
from typing import Annotated

import typer

from moe_dist.errors import printable
from moe_dist.runtime.command_line import reports_errors, run_command


@reports_errors("import_hf")
def main(
    folder: Annotated[Path, typer.Argument(help="A model: config.json, safetensors and, if it has one, tokenizer.json.")],
    out: Annotated[Path, typer.Option(help="Folder to make; it must not exist.")],
    null_experts: Annotated[int, typer.Option(min=0, help="Null experts to add; their router rows are copies.")] = 0,
    top_k: Annotated[int | None, typer.Option(min=1, help="Choices a token makes with --null-experts.")] = None,
    experts: Annotated[int, typer.Option(min=1, help="Number of experts, as copies of each FFN of a dense model.")] = 1,
    experts_top_k: Annotated[int, typer.Option(min=1, help="Choices a token makes among --experts.")] = 1,
    modalities: Annotated[str, typer.Option(help="Modalities of the data, separated by commas.")] = "text",
    data: Annotated[str, typer.Option(help="data.path of the configuration that is written.")] = ".cache/data/openmoji",
    seed: Annotated[int, typer.Option(min=0, help="Seed of new router rows, and of the configuration.")] = 0,
    shard_mb: Annotated[int, typer.Option(min=1, help="Largest size of a shard in MB; sets the memory needed.")] = 512,
) -> None:
    """Import a model. After a kill the same command continues."""
    from moe_dist.hf.importing import import_model
    from moe_dist.hf.plan import ImportOptions
    from moe_dist.runtime.progress import shown_progress

    options = ImportOptions(null_experts, top_k, experts, experts_top_k, seed, tuple(modalities.split(",")))
    with shown_progress() as report:
        done = import_model(folder, out, options, data_path=data, shard_bytes=shard_mb * 10**6, report=report)
    if done.ignored:
        print(printable(f"not opened, since reading them can run code: {', '.join(done.ignored)}"))
    if done.unread:
        print(printable(f"fields of config.json that were not looked at: {', '.join(done.unread)}"))
    if done.left_out:
        names = printable(f"{len(done.left_out)} tensors, {done.left_out[0]} to {done.left_out[-1]}")
        print(f"left out, because they are no part of the model (as multi-token prediction): {names}")
    stored = ", ".join(f"{count} {dtype}" for dtype, count in done.converted.items())
    print(
        f"{done.family}: {done.tensors} tensors (stored: {stored}) as F32 in {done.shards} shards, {done.kept} of them kept"
    )
    print(f"train it: moe-dist launch local {out / 'config.yaml'}")


if __name__ == "__main__":
    run_command(main)
