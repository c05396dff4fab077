"""Exports a checkpoint as a Hugging Face folder that transformers loads. See docs/huggingface.md."""

import os
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from moe_dist.errors import ConfigError
from moe_dist.runtime.command_line import reports_errors, run_command

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@reports_errors("export_hf")
def main(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint (step_N), a run, or an import.")],
    out: Annotated[Path, typer.Option(help="Folder to make; it must not exist.")],
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; by default that of the import, else float32.")
    ] = None,
    family: Annotated[
        str | None, typer.Option(help="model_type to write; by default that of the import, else one that fits.")
    ] = None,
    like: Annotated[Path | None, typer.Option(help="Folder with the config.json and tokenizer to copy.")] = None,
    adapters: Annotated[bool, typer.Option("--adapters", help="Write the adapters alone, in PEFT's form.")] = False,
    data: Annotated[
        Path | None, typer.Option(help="Where the data set is that the run was trained on; by default its data.path.")
    ] = None,
    shard_mb: Annotated[
        int | None, typer.Option(min=1, help="Largest size of a file of weights, in MB; by default 2000.")
    ] = None,
) -> None:
    """Export a checkpoint, and verify its weights by their fingerprints."""
    from moe_dist.checkpoint.contents import open_checkpoint
    from moe_dist.checkpoint.directory import find_checkpoint
    from moe_dist.hf.exporting import SHARD_BYTES, checked_config, export_model
    from moe_dist.runtime.progress import shown_progress

    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"--dtype={dtype}: must be {', '.join(DTYPES)}")
    hosted = checked_config(open_checkpoint(find_checkpoint(checkpoint))).engine.hosts
    if adapters:
        if hosted:
            from moe_dist.hf.host.weights import export_hosted_adapters as export
        else:
            from moe_dist.hf.adapters import export_adapters as export

        unused = {"--dtype": dtype, "--family": family, "--data": data, "--shard-mb": shard_mb}
        if given := [option for option, value in unused.items() if value is not None]:
            raise ConfigError(f"{', '.join(given)}: does not apply with --adapters; leave it out")
        print(f"{export(checkpoint, out, base_name=None if like is None else str(like))} matrices of adapters")
        print(f"{out} is made")
        return
    if hosted:
        unused = {"--dtype": dtype, "--family": family, "--like": like, "--shard-mb": shard_mb}
        if given := [option for option, value in unused.items() if value is not None]:
            raise ConfigError(f"{', '.join(given)}: does not apply to a model of transformers; leave it out")
        print(f"{_write_hosted(checkpoint, out, data)}\n{out} is made")
        return
    with shown_progress() as report:
        done = export_model(
            checkpoint,
            out,
            dtype=DTYPES[dtype] if dtype else None,
            family=family,
            like=like,
            data=data,
            shard_bytes=shard_mb * 10**6 if shard_mb else SHARD_BYTES,
            report=report,
        )
    if done.merged:
        print("adapters merged into their base")
    if done.folded:
        print(f"{done.folded} null experts a layer left out: they were copies of true rows, so nothing changes")
    if done.reasons:
        print("no plain family of transformers can express this model:", *done.reasons, sep="\n  - ")
        print("the folder brings its own code, so load it with trust_remote_code=True")
    print(
        f"{done.family}: {done.tensors} tensors in {done.shards} files; config.json after {done.like or 'the model alone'}"
    )
    print(f"{out} is made")


def _write_hosted(checkpoint: Path, out: Path, data: Path | None = None) -> str:
    """Writes a checkpoint as the new folder `out`, with the tokenizer of `model.folder`, and returns a line that describes
    it. Needs host memory for the whole model in fp32.

    Raises:
        ConfigError: `out` exists, the run cannot be read (`find_trained`), or its tokens leave out choices of the router.
    """
    import torch

    from moe_dist.checkpoint.storage import new_folder
    from moe_dist.hf.code_checks import refuse_code
    from moe_dist.hf.host.dense_files import groups_of
    from moe_dist.hf.host.lora import merge_adapters
    from moe_dist.hf.host.weights import refuse_masked, write_folder
    from moe_dist.hf.served_fields import DENSE_CODE
    from moe_dist.hf.source import COMPANIONS, companion
    from moe_dist.inference.loaded_run import find_trained

    if os.path.lexists(out):
        raise ConfigError(f"{out} exists; nothing is overwritten: remove it, or choose another folder")
    run = find_trained(checkpoint, data=data)
    refuse_masked(run.config.model.moe)
    model: Any = run.load(torch.device("cpu"))
    merge_adapters(model.family, model.adapters)
    source = Path(run.config.model.folder or "")
    there = run.config.model.folder is not None and source.is_dir()
    if there:
        refuse_code(source)
    elif run.config.model.folder is not None:
        print(f"model.folder={str(source)!r} is gone: the export has no tokenizer; copy its files from elsewhere")
    with new_folder(out) as folder:
        write_folder(model, folder, groups_of(run.config.model, run.manifest))
        for name in COMPANIONS if there else ():
            if (source / name).is_file():
                shutil.copyfile(companion(source, name), folder / name)
    if (out / DENSE_CODE[0]).exists():
        return f"{run.config.model.family} with experts: it brings its own code, so load it with trust_remote_code=True"
    return f"{run.config.model.family}: the family's own files"


if __name__ == "__main__":
    run_command(main)
