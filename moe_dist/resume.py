"""What a checkpoint of a run is made of, and how a run goes on from one."""

import logging

from moe_dist.build import Training
from moe_dist.checkpoint.manager import CheckpointManager
from moe_dist.checkpoint.state import RankLayout, capture
from moe_dist.config.schema import Config
from moe_dist.errors import DataError
from moe_dist.placement.placement import ExpertPlacement
from moe_dist.trainer import Progress

logger = logging.getLogger(__name__)


class Resumable:
    """Saves and restores one rank's part of a run. Both are collective over the world.

    Args:
        training: Model and optimizer.
        placement: Which expert lives on which rank.
        checkpoints: Of the run.
        config: Saved beside the weights, for the reader.
    """

    def __init__(
        self, training: Training, placement: ExpertPlacement, checkpoints: CheckpointManager, config: Config
    ) -> None:
        mesh = training.parallel.mesh
        self._training, self._checkpoints, self._config = training, checkpoints, config
        self._layout = RankLayout(
            placement,
            rank=mesh.rank,
            world_size=mesh.world_size,
            ep_rank=mesh.ep_rank,
            edp_rank=mesh.edp_rank,
            edp_size=mesh.edp_size,
        )

    def save(self, progress: Progress) -> None:
        """Commits a checkpoint of the present state.

        Raises:
            CheckpointError: on all ranks, where one could not write; the last checkpoint stands.
        """
        values = {"progress": progress.to_json(), "config": self._config.model_dump(mode="json")}
        state = capture(self._training.parallel.model, self._training.optimizer, self._layout, values=values)
        self._checkpoints.save(progress.step, state)

    def restore(self) -> Progress:
        """Loads the newest checkpoint into model and optimizer, and returns where it stands; a new run starts at 0.

        Raises:
            DataError: the checkpoint is damaged.
            ConfigError: it is of another model.
        """
        newest = self._checkpoints.latest()
        if newest is None:
            return Progress()
        state = capture(self._training.parallel.model, self._training.optimizer, self._layout)
        values = self._checkpoints.load(newest, state).values
        saved = values.get("progress")
        if not isinstance(saved, dict) or set(saved) != set(Progress().to_json()):
            raise DataError(f"{newest}: its state.json holds no progress of a run, but {saved!r}")
        logger.info("going on from %s", newest)
        return Progress(**{name: int(value) for name, value in saved.items()})  # pyright: ignore[reportArgumentType]
