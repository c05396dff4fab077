"""Asks the model of a finished run multiple-choice questions, and makes samples for tuning the model's routers."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from moe_dist.checkpoint.base import content_hash
from moe_dist.checkpoint.contents import open_checkpoint
from moe_dist.checkpoint.directory import find_checkpoint
from moe_dist.config.schema import Config
from moe_dist.errors import ConfigError, DataError
from moe_dist.formats.manifest import Manifest, load_manifest
from moe_dist.inference.fact import Fact, Question
from moe_dist.inference.likelihood import Likelihood
from moe_dist.inference.multiple_choice import MEASURES, Prompts, ask, write
from moe_dist.inference.questions.catalogue import Catalogue, task_names
from moe_dist.inference.questions.files import fact_lines
from moe_dist.inference.questions.split import Side
from moe_dist.inference.router_tuning.embedder import PACKAGED, Embedder
from moe_dist.inference.vocabulary import Vocabulary
from moe_dist.model.transformer import Transformer
from moe_dist.runtime.files import write_atomically
from moe_dist.runtime.signals import child_of
from moe_dist.train.router_tuning.loader import SampleMaker
from moe_dist.train.router_tuning.samples import Samples
from research.experiments.first_tokens import FirstTokens, has_own_first_token, shortened
from research.experiments.oracle import Oracle
from research.experiments.study import QuestionsSection
from research.experiments.subsets import make_subsets
from research.questions.sources import make_facts, text_tasks

MEASURE = MEASURES[0]  # log-likelihood per token
SAMPLES = "samples"


@dataclass
class QuestionRound:
    """Asks a model validation or test questions. The model's answer is the choice with the highest log-likelihood per token
    or, with `first_token`, the choice whose first token has the highest logit."""

    model: Transformer  # all experts of the model are on this process
    config: Config
    manifest: Manifest
    group_of_modality: Tensor  # int64 [M], index of the expert group of each of the M modalities
    section: QuestionsSection
    side: Side

    def __post_init__(self) -> None:
        tasks, catalogue = catalogue_of(self.section, self.config, self.manifest)
        self._prompts = Prompts(catalogue.vocabulary, listed=self.section.listed)
        self._questions = {task: asked(self.section, catalogue, task, self.side) for task in tasks}
        groups, max_seq_len = self.group_of_modality.tolist(), self.config.model.max_seq_len
        self._likelihood = Likelihood(self.model, self.manifest, group_of_modality=groups, max_seq_len=max_seq_len)

    def record(self) -> dict[str, Any]:
        """Returns the accuracy in each task, and the mean accuracy over tasks."""
        by_task = {task: _counted(self._answered(questions)) for task, questions in self._questions.items()}
        return {"side": str(self.side), **_mean(by_task)}

    def oracle(self) -> dict[str, Any]:
        """Returns the accuracy on the first questions of each task, after the routing of the last layers was fitted to the
        right answers. The key `before` has the accuracy without the fit."""
        layers = len(self.config.model.moe_layers)
        oracle = Oracle(
            self.model,
            SampleMaker(self.manifest),
            group_of_modality=self.group_of_modality,
            places=range(max(0, layers - self.section.oracle_layers), layers),
        )
        by_task = {}
        for task, questions in self._questions.items():
            few = questions[: self.section.oracle_questions]
            written = [self._prompts(each) for each in few]
            if self.section.first_token:
                written = [shortened(each) for each in written]
            taken = oracle(written, [each.answer for each in few])
            right = [choice == each.answer for choice, each in zip(taken, few, strict=True)]
            by_task[task] = {**_counted(right), "before": _counted(self._answered(few))["accuracy"]}
        before = sum(each["before"] for each in by_task.values()) / len(by_task)
        return {"side": str(self.side), **_mean(by_task), "before": before}

    def _answered(self, questions: Sequence[Question]) -> list[bool]:
        written = write(questions, self._prompts, rotations=False, max_seq_len=self.config.model.max_seq_len)
        if self.section.first_token:
            answer = FirstTokens(self.model, SampleMaker(self.manifest), self.group_of_modality)
            taken = answer([turns[0] for turns in written])
            return [choice == each.answer for choice, each in zip(taken, questions, strict=True)]
        return [each.right(MEASURE) for each in ask(questions, written, self._likelihood)]


def _counted(right: Sequence[bool]) -> dict[str, Any]:
    return {"questions": len(right), "right": sum(right), "accuracy": sum(right) / len(right)}


def _mean(by_task: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "questions": sum(each["questions"] for each in by_task.values()),
        "accuracy": sum(each["accuracy"] for each in by_task.values()) / len(by_task),
        "by_task": dict(by_task),
    }


def catalogue_of(section: QuestionsSection, config: Config, manifest: Manifest) -> tuple[list[str], Catalogue]:
    """Returns the names of the tasks that `section` selects, and the catalogue that makes the tasks' questions.

    Raises:
        ConfigError: a task is unknown, or a package that a task needs is missing.
    """
    facts = facts_of(section)
    tasks = task_names(",".join(section.tasks), facts)
    vocabulary = Vocabulary(config.data.path, manifest, vocab_size=config.model.vocab_size)
    catalogue = Catalogue(vocabulary, tuple(manifest.sources), facts)
    catalogue.check(tasks)
    return tasks, catalogue


def facts_of(section: QuestionsSection) -> dict[str, list[Fact]]:
    return make_facts(text_tasks(section.tasks), wordnet=Path(section.wordnet))


def asked(section: QuestionsSection, catalogue: Catalogue, task: str, side: Side) -> list[Question]:
    """Returns the questions of a task that are asked. With `first_token`, these are only the questions in which no wrong
    choice has the same first token as the right choice."""
    questions = catalogue.questions(task, side, limit=section.limit)
    if not section.first_token:
        return questions
    prompts = Prompts(catalogue.vocabulary, listed=section.listed)
    return [each for each in questions if has_own_first_token(prompts(each), each.answer)]


def check_questions(section: QuestionsSection, config: Config, *, samples: bool) -> None:
    """Checks, before training starts, that the files for the measurement exist and that there are enough questions.

    Raises:
        ConfigError: files are missing (`make wordnet embedder` fetches them), or there are too few test questions.
    """
    try:
        tasks, catalogue = catalogue_of(section, config, load_manifest(config.data.path))
        if samples:
            Embedder(_embedder(section))
    except ConfigError as error:
        raise ConfigError([f"measure.questions: {error}", "what is not there, `make wordnet embedder` fetches"]) from error
    count = sum(len(asked(section, catalogue, task, Side.TEST)) for task in tasks)
    if count < section.least:
        raise ConfigError(
            f"measure.questions.least={section.least}: {', '.join(tasks)} have {count} test questions in all; take more "
            "tasks, or say in the study that fewer are enough"
        )


def make_samples(run: Path, section: QuestionsSection) -> dict[str, Any]:
    """Makes samples for router tuning from a run, by `tools.prepare_router_tuning`. Keeps existing samples.

    Raises:
        DataError: the tool failed and printed the reason, or the existing samples were made with different options.
    """
    folder = run / SAMPLES
    facts = facts_of(section)
    if not folder.is_dir():
        questions = run / "facts.jsonl"
        write_atomically(questions, fact_lines(facts))
        command = [sys.executable, "-m", "tools.prepare_router_tuning", str(run), "--device", "cpu"]
        command += ["--rotations" if section.listed else "--no-rotations"]
        command += ["--tasks", ",".join(section.tasks), "--questions", str(questions), "--limit", str(section.left)]
        command += ["--embedder", str(_embedder(section)), "--out", str(folder)]
        ended = subprocess.run(command, check=False, preexec_fn=child_of(os.getpid(), ignore_stop=False))
        if ended.returncode:
            raise DataError(f"{folder}: tools.prepare_router_tuning ended with {ended.returncode}")
    manifest = Samples(folder).manifest
    made_and_asked = {
        "tasks": (list(manifest.tasks), task_names(",".join(section.tasks), facts)),
        "left": (manifest.options["limit"], section.left),
        "listed": (manifest.options["rotations"], section.listed),
        "embedder": (manifest.embedder, Embedder(_embedder(section)).sha256),
        "checkpoint": (manifest.checkpoint, content_hash(open_checkpoint(find_checkpoint(run)).index)),
    }
    if differ := [name for name, (made, asked) in made_and_asked.items() if made != asked]:
        raise DataError(
            f"{folder}: was made with other {', '.join(differ)} than are asked for; remove it and the runs that were tuned "
            "on it, and start again"
        )
    made = {"folder": str(folder), "samples": manifest.samples, "right": manifest.right}
    return {**made, "sizes": make_subsets(folder, section.sizes, labelled=section.first_token)} if section.sizes else made


def _embedder(section: QuestionsSection) -> Path:
    return Path(section.embedder) if section.embedder else PACKAGED
