"""Defines the MLflow sink. It needs the extra moe_dist[mlflow]. mlflow is imported only if this sink is configured."""

import time
from collections.abc import Mapping
from typing import Any

from moe_dist.errors import ConfigError
from moe_dist.monitor.sinks.sink import ScalarSink, SinkContext


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
