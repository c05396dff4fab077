"""Builds a whole run on one rank in this process, ready to resume, for tests of the run's saved state."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moe_dist.parallel.mesh import destroy_world
from moe_dist.runtime.attempt import Attempt
from moe_dist.runtime.environment import RankEnv
from moe_dist.runtime.run_folder import RunFolder
from moe_dist.train.loop.session import open_sinks, watched_devices
from moe_dist.train.loop.trainer import Progress, Trainer
from moe_dist.train.start.resume import Controller
from tests.support.engine_run import built_run
from tests.support.tiny import tiny_config


@contextmanager
def world_of_one() -> Iterator[None]:
    """Makes this process a world of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        destroy_world()


class OneRank:
    """A whole run on one rank, built and ready to resume."""

    def __init__(self, data: Path, root: Path, controllers: Mapping[str, Controller] | None = None, **changes: Any) -> None:
        alone = {"parallel.ep": 1, "placement.policy": "interleaved"}
        changes = {key.replace("__", "."): value for key, value in changes.items()}
        self._built = ExitStack()
        self.run = self._built.enter_context(built_run(tiny_config(data, root, {**alone, **changes})))
        self.plan, self.training = self.run.checked, self.run.training
        self.folder = RunFolder.of(self.run.config).checkpoints
        self.resumable = self.run.saver(controllers=controllers)

    @contextmanager
    def trainer(self, further_sinks: Sequence[Any] = (), attempt_id: str = "one") -> Iterator[Trainer]:
        """Yields the trainer of the run at its start, with the run's sinks and `further_sinks`."""
        config = self.run.config
        env = RankEnv(0, 1, 0, 1, init_method="", attempt=0, attempt_id=attempt_id)
        attempt = Attempt(env)
        folder = attempt.open(config)
        trainer = self.run.trainer(self.resumable)
        with (
            watched_devices(config, self.run.mesh.device, env) as trainer.devices,
            open_sinks(self.plan, folder, env, attempt, progress=trainer.progress) as sinks,
        ):
            trainer.sinks = [*sinks, *further_sinks]
            yield trainer
        attempt.lease.release()

    def train_and_save(self) -> Progress:
        """Takes two steps of a new run with made-up gradients, and saves."""
        assert self.resumable.restore() == Progress()
        for _ in range(2):
            for number, parameter in enumerate(self.training.parallel.model.parameters()):
                parameter.grad = torch.full_like(parameter, 0.5 + number)
            self.training.optimizer.step()
        progress = Progress(step=2, position=16, tokens=100, skipped_steps=0, skipped_in_a_row=0, evaluated=2)
        self.resumable.save(progress, durable=True)
        return progress

    def weights(self) -> torch.Tensor:
        return torch.cat([each.detach().flatten() for each in self.training.parallel.model.parameters()])

    def moments(self) -> torch.Tensor:
        states = self.training.optimizer.state
        # frozen parameters have no state
        parameters = [each for each in self.training.parallel.model.parameters() if each in states]
        return torch.cat([states[each][name].flatten() for each in parameters for name in ("exp_avg", "exp_avg_sq")])
