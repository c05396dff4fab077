"""Defines the distillation term of a training step, and the teacher.

    loss = (1 - weight) cross entropy + weight KL       means over the labels of the step
    KL = KL(teacher || model), or with the divergence `reverse` KL(model || teacher)

Every rank has the whole teacher, frozen and in evaluation mode, and runs it on its own tokens. The term needs no
collective.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from moe_dist.checkpoint.base import KEY
from moe_dist.checkpoint.contents import open_checkpoint
from moe_dist.checkpoint.directory import find_checkpoint
from moe_dist.checkpoint.manager import CheckpointManager
from moe_dist.checkpoint.state import RankLayout, capture
from moe_dist.config.model_schema import ModelSection
from moe_dist.config.partial import read_stored
from moe_dist.data.batch import Batch
from moe_dist.errors import ConfigError
from moe_dist.formats.manifest import Manifest
from moe_dist.model.objective import Divergence, TeacherOutput
from moe_dist.placement.placement import ExpertPlacement
from moe_dist.train.objective.loss import MicroLoss, forward


class Distillation:
    """Adds the distillation term to the loss of micro-batches.

    Args:
        outputs: Returns the teacher's output for a micro-batch, as a `Teacher` does.
        weight: Weight of the KL divergence in the loss; cross entropy has weight 1 - `weight`.
    """

    def __init__(self, outputs: Callable[[Batch], TeacherOutput], *, weight: float) -> None:
        self.outputs, self._weight = outputs, weight

    def add(self, loss: MicroLoss, losses_BS: Tensor, kl_BS: Tensor, labels_in_step: Tensor) -> MicroLoss:
        """Returns the micro-batch's loss after KL divergence replaces the fraction `weight` of its cross entropy."""
        term = self._weight * kl_BS.sum() / labels_in_step
        total = loss.total + term - self._weight * losses_BS.sum() / labels_in_step
        return loss._replace(total=total, auxiliary=loss.auxiliary + term.detach().to(torch.float64))


class Teacher:
    """A frozen model that has all its weights on this rank. `group_of_modality` maps modalities to the teacher's groups."""

    def __init__(self, model: nn.Module, group_of_modality: Tensor, *, divergence: Divergence = "forward") -> None:
        self._model, self._group_of_modality = model, group_of_modality
        self._divergence: Divergence = divergence

    @torch.no_grad()
    def __call__(self, batch: Batch) -> TeacherOutput:
        """Runs the teacher on a micro-batch, which must be on the teacher's device."""
        logits_BSV, _ = forward(self._model, batch, self._group_of_modality)
        log_prob_BSV = logits_BSV.to(torch.promote_types(logits_BSV.dtype, torch.float32)).log_softmax(-1)
        return TeacherOutput(log_prob_BSV, divergence=self._divergence)


def teacher_section(path: str, student: ModelSection, manifest: Manifest, *, seq_len: int) -> tuple[Path, ModelSection]:
    """Returns the folder of the teacher's checkpoint, and the section `model` of the configuration saved in it.

    Args:
        path: Path of a run folder, a checkpoint or an import (`loss.distillation.teacher`).
        manifest: Manifest of the student's training data.

    Raises:
        ConfigError: there is no checkpoint, or the checkpoint's model cannot be the teacher. The error lists every reason.
        DataError: the checkpoint is damaged.
    """
    key = f"loss.distillation.teacher={path!r}"
    contents = open_checkpoint(find_checkpoint(Path(path)))
    values = contents.state.values
    if KEY in values:
        raise ConfigError(f"{key}: holds adapters without their base; export it merged, and import that as the teacher")
    config = values.get("config")
    try:
        found = read_stored(ModelSection, config.get("model") if isinstance(config, dict) else None)
    except ConfigError as error:
        said = "; ".join(error.problems)
        raise ConfigError(f"{key}: its state.json has no model that this version can read: {said}") from error
    problems = []
    if found.vocab_size != student.vocab_size:
        problems.append(
            f"{key}: its vocab_size={found.vocab_size}, model.vocab_size={student.vocab_size}; the KL compares word by "
            "word, so take a teacher with the model's tokenizer"
        )
    known = {name for group, section in found.moe.groups.items() for name in section.modalities or (group,)}
    if missing := [name for name in manifest.modalities if name not in known]:
        problems.append(
            f"{key}: none of its expert groups takes the modality {missing[0]!r} of data.path; it knows "
            f"{', '.join(sorted(known))}: take a teacher of these data, or import it with --modalities"
        )
    if found.max_seq_len < seq_len:
        problems.append(f"{key}: its max_seq_len={found.max_seq_len} is below data.seq_len={seq_len}; lower seq_len")
    if problems:
        raise ConfigError(problems, see="docs/adapt.md")
    return contents.folder, found


def load_teacher(teacher: nn.Module, folder: Path, placement: ExpertPlacement) -> None:
    """Loads the teacher's checkpoint on this rank and freezes the teacher. `placement` must put all experts on one rank."""
    manager = CheckpointManager(folder.parent, keep=1, lease_check=lambda: None)
    manager.load(folder, capture(teacher, None, RankLayout(placement)))
    teacher.requires_grad_(False)
