"""Multiple-choice questions to a finished run, and what router tuning is given of it."""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from moe_dist.config.manifest import Manifest
from moe_dist.config.schema import Config
from moe_dist.errors import DataError
from moe_dist.evaluation.likelihood import Likelihood
from moe_dist.evaluation.multiple_choice import MEASURES, Prompts, ask, write
from moe_dist.evaluation.questions.catalogue import Catalogue, task_names
from moe_dist.evaluation.questions.split import Side
from moe_dist.generation.material import Material
from moe_dist.model.transformer import Transformer
from moe_dist.router_tuning.loader import SampleMaker
from moe_dist.router_tuning.samples import Samples
from tools.reproduction.oracle import Oracle
from tools.reproduction.study import QuestionsSection

MEASURE = MEASURES[0]  # by token
SAMPLES = "samples"


class Asking:
    """Asks one model the questions of one side, choices by their log-likelihood a token.

    Args:
        model: All of it, on this process.
        config, manifest: Of the run and its data.
        group_of_modality: int64 [M].
        section: Which questions.
        side: Of them.
    """

    def __init__(
        self,
        model: Transformer,
        config: Config,
        manifest: Manifest,
        *,
        group_of_modality: Tensor,
        section: QuestionsSection,
        side: Side,
    ) -> None:
        self._model, self._config, self._manifest, self._section = model, config, manifest, section
        self._group_of_modality = group_of_modality
        material = Material(config.data.path, manifest, vocab_size=config.model.vocab_size)
        catalogue = Catalogue(material, tuple(manifest.sources), Path(section.wordnet))
        tasks = task_names(",".join(section.tasks))
        catalogue.check(tasks)
        self._prompts, self._side = Prompts(material, listed=False), side
        self._questions = {task: catalogue.questions(task, side, limit=section.limit) for task in tasks}

    def record(self) -> dict[str, Any]:
        """Accuracy: the mean over tasks, and of each."""
        likelihood = Likelihood(
            self._model,
            self._manifest,
            group_of_modality=self._group_of_modality.tolist(),
            max_seq_len=self._config.model.max_seq_len,
        )
        by_task = {}
        for task, questions in self._questions.items():
            written = write(questions, self._prompts, rotations=False, max_seq_len=self._config.model.max_seq_len)
            answered = ask(questions, written, likelihood)
            by_task[task] = _counted([each.right(MEASURE) for each in answered])
        return {"side": str(self._side), **_mean(by_task)}

    def oracle(self) -> dict[str, Any]:
        """The same of the first questions of each task, with routing of the last layers fitted to the labels."""
        layers = len(self._config.model.moe_layers)
        oracle = Oracle(
            self._model,
            SampleMaker(self._manifest),
            group_of_modality=self._group_of_modality,
            places=range(max(0, layers - self._section.oracle_layers), layers),
        )
        by_task = {}
        for task, questions in self._questions.items():
            few = questions[: self._section.oracle_questions]
            taken = oracle([self._prompts(each) for each in few], [each.answer for each in few])
            by_task[task] = _counted([choice == each.answer for choice, each in zip(taken, few, strict=True)])
        return {"side": str(self._side), **_mean(by_task)}


def _counted(right: Sequence[bool]) -> dict[str, Any]:
    return {"questions": len(right), "right": sum(right), "accuracy": sum(right) / len(right)}


def _mean(by_task: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "questions": sum(each["questions"] for each in by_task.values()),
        "accuracy": sum(each["accuracy"] for each in by_task.values()) / len(by_task),
        "by_task": dict(by_task),
    }


def samples_folder(run: Path) -> Path:
    """Where the samples of a run lie."""
    return run / SAMPLES


def make_samples(run: Path, section: QuestionsSection) -> dict[str, Any]:
    """What router tuning of a run is trained on, by `tools.prepare_router_tuning`; kept where it is there already.

    Raises:
        DataError: it could not be made; what it says stands above.
    """
    folder = samples_folder(run)
    if not folder.is_dir():
        command = [sys.executable, "-m", "tools.prepare_router_tuning", str(run), "--no-rotations", "--device", "cpu"]
        command += ["--tasks", ",".join(section.tasks), "--limit", str(section.left), "--wordnet", section.wordnet]
        command += ["--embedder", section.embedder] if section.embedder else []
        code = subprocess.run([*command, "--out", str(folder)], check=False).returncode
        if code:
            raise DataError(f"{folder}: tools.prepare_router_tuning ended with {code}")
    manifest = Samples(folder).manifest
    return {"folder": str(folder), "samples": manifest.samples, "right": manifest.right}
