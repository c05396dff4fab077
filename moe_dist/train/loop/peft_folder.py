"""Writes the adapters of a finished run, in PEFT's format, to the folder `adapters/step_N` of the run."""

from moe_dist.config.schema import Config
from moe_dist.errors import ConfigError
from moe_dist.runtime.run_folder import RunFolder


def write_adapters(config: Config, folder: RunFolder, step: int) -> str:
    """Writes the folder from the newest checkpoint, which must be of step `step`. Does nothing if the folder exists.

    Returns a line for the summary: the folder, or the reason why PEFT's format cannot store the adapters. Returns "" if the
    run trains no adapters.

    Raises:
        DataError: the base checkpoint of the adapters is missing or has changed.
        CheckpointError: the folder cannot be written.
    """
    if config.train.only != "adapters":
        return ""
    if config.engine.hosts:
        from moe_dist.hf.host.weights import export_hosted_adapters as export  # imported late, as few runs need it
    else:
        from moe_dist.hf.adapters import export_adapters as export

    out = folder.path / "adapters" / f"step_{step}"
    try:
        if not out.exists():
            export(folder.checkpoints, out)
    except ConfigError as error:
        return f"no adapters in PEFT's form: {error.problems[0]}"
    return f"adapters in PEFT's form: {out}"
