"""Defines the Weights & Biases sink. Needs the extra moe_dist[wandb]; wandb is imported only if the sink is configured."""

from collections.abc import Mapping
from typing import Any

from moe_dist.errors import ConfigError
from moe_dist.monitor.sinks.sink import ScalarSink, SinkContext


class WandbSink(ScalarSink):
    """Starts a wandb run for each attempt (start of the run), because wandb cannot go back in steps. The wandb group joins
    a run's attempts; it has the run's name. Raises ConfigError if wandb is not installed, or has no key for online mode.
    The mode 'online' uses the key of `wandb login` or WANDB_API_KEY. The mode 'offline' only writes files in the run
    folder, which `wandb sync` can upload later."""

    def __init__(self, context: SinkContext, *, project: str, mode: str = "online") -> None:
        run_name, resume_step, folder = context.run_name, context.resume_step, context.folder
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                "monitor.sinks: kind wandb needs the package wandb; install moe_dist[wandb], or take the sink out"
            ) from error
        name = f"{run_name} from step {resume_step}" if resume_step else run_name
        settings = wandb.Settings(
            mode="offline" if mode == "offline" else "online",
            console="off",  # ConsoleSink writes to the console
            silent=True,
            disable_code=True,
            disable_git=True,
            x_disable_stats=True,  # moe_dist's own scalars have the device readings
        )
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._run: Any = wandb.init(project=project, group=run_name, name=name, dir=str(folder), settings=settings)
        except wandb.errors.UsageError as error:  # pyright: ignore[reportAttributeAccessIssue]
            raise ConfigError(
                f"monitor.sinks: kind wandb, mode {mode!r}: {error}; or set WANDB_API_KEY, or take mode: offline"
            ) from error

    def log(self, scalars: Mapping[str, float | None], step: int) -> None:
        known = {tag: value for tag, value in scalars.items() if value is not None}
        self._run.log(known, step=step, commit=False)  # an evaluation of this step goes into the same wandb row

    def text(self, tag: str, markdown: str) -> None:
        self._run.config.update({tag: markdown}, allow_val_change=True)

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None
