"""Defines the sinks for Weights & Biases and MLflow. They need the extras moe_dist[wandb] and moe_dist[mlflow], which are
imported only if the sink is configured."""

import time
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


class MlflowSink(ScalarSink):
    """Starts an MLflow run for each attempt (start of the run). In a single MLflow run, each step that a resumed run
    repeats would have two values. The tag `moe_dist.run` joins the attempts of a run. MLflow's threads send the values, so
    that a slow server delays no step. Raises ConfigError if mlflow is not installed, or if the server does not answer or
    refuses the run. `uri` is the tracking server, by default MLFLOW_TRACKING_URI. MLflow reads credentials from its own
    environment variables."""

    def __init__(self, context: SinkContext, *, experiment: str, uri: str | None = None) -> None:
        run_name, resume_step = context.run_name, context.resume_step
        try:
            import mlflow  # imported late, because the import takes seconds
        except ImportError as error:
            raise ConfigError(
                "monitor.sinks: kind mlflow needs the package mlflow-skinny; install moe_dist[mlflow], or take the sink out"
            ) from error
        name = f"{run_name} from step {resume_step}" if resume_step else run_name
        try:
            if uri is not None:
                mlflow.set_tracking_uri(uri)
            self._mlflow, self._client = mlflow, mlflow.MlflowClient()
            found = self._client.get_experiment_by_name(experiment)
            known = found.experiment_id if found else self._client.create_experiment(experiment)
            run = self._client.create_run(known, run_name=name, tags={"moe_dist.run": run_name})
        except mlflow.MlflowException as error:
            raise ConfigError(
                f"monitor.sinks: kind mlflow, server {mlflow.get_tracking_uri()}: {error}; set uri or MLFLOW_TRACKING_URI "
                "to a tracking server that answers, or take the sink out"
            ) from error
        self._run: str | None = run.info.run_id

    def text(self, tag: str, markdown: str) -> None:
        if self._run is not None:
            self._client.set_tag(self._run, tag, markdown[:5000])  # the server refuses longer tags

    def close(self) -> None:
        if self._run is None:
            return
        run, self._run = self._run, None
        self._mlflow.flush_async_logging()  # waits for the server
        self._client.set_terminated(run)

    def log(self, scalars: Mapping[str, float | None], step: int) -> None:
        now = int(time.time() * 1000)
        known: list[Any] = [
            self._mlflow.entities.Metric(tag, value, now, step) for tag, value in scalars.items() if value is not None
        ]
        if self._run is not None:
            self._client.log_batch(self._run, metrics=known, synchronous=False)
