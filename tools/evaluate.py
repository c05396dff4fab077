"""Measures the multiple-choice accuracy of a trained run, and runs tasks of lm-evaluation-harness. See
docs/evaluation.md."""

import importlib.util
import json
import os
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from moe_dist.checkpoint.directory import CHECKPOINTS, run_path
from moe_dist.errors import ConfigError
from moe_dist.inference.likelihood import Likelihood
from moe_dist.inference.loaded_run import LoadedRun, RunOptions, causal_problems, choose_device
from moe_dist.inference.multiple_choice import MEASURES, Prompts, ask, check_vocabulary, results, write
from moe_dist.inference.questions.catalogue import Catalogue, task_names
from moe_dist.inference.questions.files import read_facts
from moe_dist.inference.questions.split import Side
from moe_dist.inference.vocabulary import Vocabulary
from moe_dist.parallel.mesh import one_group
from moe_dist.runtime.command_line import reports_errors, run_command, takes
from moe_dist.runtime.environment import RankEnv
from moe_dist.runtime.files import make_writable


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(RunOptions):
    tasks: Annotated[
        str, typer.Option(help="Tasks, separated by commas: pictures, and those of --questions; by default the latter.")
    ] = ""
    questions: Annotated[str, typer.Option(help="Files of questions (docs/evaluation.md), separated by commas.")] = ""
    harness: Annotated[str, typer.Option(help="Tasks of lm-evaluation-harness, names or YAML files, with commas.")] = ""
    split: Annotated[Side, typer.Option(help="Ask the questions of this side.")] = Side.TEST
    limit: Annotated[int, typer.Option(min=0, help="Questions of each task, chosen by the seed; 0 for all.")] = 500
    rotations: Annotated[
        bool, typer.Option("--rotations", help="List the choices; an answer must be right in every rotation of them.")
    ] = False
    seed: Annotated[int, typer.Option(min=0, help="Seed of sides, choices and intervals.")] = 0
    out: Annotated[Path | None, typer.Option(help="Folder for the results; by default `evaluations` in the run.")] = None
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON instead of a table.")] = False

    @property
    def harness_tasks(self) -> list[str]:
        return [name.strip() for name in self.harness.split(",") if name.strip()]

    @property
    def question_files(self) -> list[Path]:
        return [Path(name.strip()) for name in self.questions.split(",") if name.strip()]


@reports_errors("evaluate")
@takes(EvaluateOptions)
def main(options: EvaluateOptions) -> None:
    """Evaluate a trained run."""
    env = RankEnv.from_environment(os.environ)
    _check(options, env)  # checked before the model is loaded, because loading is slow
    facts = read_facts(options.question_files)
    tasks = task_names(options.tasks, facts)
    device = choose_device(options.device)
    trained = options.find(causal_problems)
    model = trained.config.model
    vocabulary = trained.vocabulary()
    check_vocabulary(vocabulary, vocab_size=model.vocab_size)
    catalogue = Catalogue(vocabulary, tuple(trained.manifest.sources), facts, options.seed)
    catalogue.check(tasks)
    limit = options.limit or None
    questions = {task: catalogue.questions(task, options.split, limit=limit) for task in tasks}
    prompts = Prompts(vocabulary, listed=options.rotations)
    written = {
        task: write(each, prompts, rotations=options.rotations, max_seq_len=model.max_seq_len)
        for task, each in questions.items()
    }
    folder = _folder(options, trained)
    with one_group(env, device) as (mesh, device):
        likelihood = trained.likelihood(device, mesh)
        answered = {task: ask(each, written[task], likelihood) for task, each in questions.items()}
        record = {
            "checkpoint": str(trained.folder),
            "step": trained.step,
            "split": str(options.split),
            "seed": options.seed,
            "limit": limit,
            "rotations": options.rotations,
            "ranks": env.world_size,
            **(results(answered, seed=options.seed) if answered else {}),
        }
        if options.harness:
            record["harness"] = _harness(options, trained, vocabulary, likelihood)
    if env.rank == 0:
        _show(options, record, _keep(folder, trained.step, record))


def _check(options: EvaluateOptions, env: RankEnv) -> None:
    run_path(options.run, CHECKPOINTS)
    if not (options.tasks or options.questions or options.harness):
        raise ConfigError("nothing to evaluate: give --tasks, --questions or --harness", see="docs/evaluation.md")
    if options.harness and importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            f"--harness {options.harness}: the package lm_eval is not installed; install moe_dist[evaluate], or "
            "leave it out"
        )
    if options.harness and env.world_size > 1:
        raise ConfigError(
            f"--harness {options.harness}: runs on one process, not on {env.world_size}; start it without torchrun"
        )
    for name in options.harness_tasks:
        if name.endswith((".yaml", ".yml")) and not Path(name).is_file():
            raise ConfigError(f"--harness {name}: no such file; give a task's YAML file or its name in lm_eval")
    named = [name for name in options.harness_tasks if not Path(name).is_file()]
    if named:
        from lm_eval.tasks import TaskManager

        known = TaskManager()  # reads the index of all tasks, which takes seconds
        if unknown := [name for name in named if name not in known.all_tasks]:
            near = get_close_matches(unknown[0], known.all_tasks, 1)
            guess = f"did you mean {near[0]}?" if near else "`lm_eval ls tasks` lists them"
            raise ConfigError(f"--harness {unknown[0]}: lm_eval has no such task; {guess}", see="docs/evaluation.md")


def _harness(
    options: EvaluateOptions, trained: LoadedRun, vocabulary: Vocabulary, likelihood: Likelihood
) -> dict[str, Any]:
    from lm_eval.api.task import Task
    from lm_eval.evaluator import simple_evaluate  # takes seconds to import
    from lm_eval.tasks import TaskManager

    from moe_dist.inference.harness import HarnessModel

    names: list[str | dict[str, Any] | Task] = [
        str(Path(name).absolute()) if Path(name).is_file() else name for name in options.harness_tasks
    ]
    max_seq_len = trained.config.model.max_seq_len
    generator = trained.generator(likelihood.model, vocabulary)
    found = simple_evaluate(
        model=HarnessModel(likelihood, generator, vocabulary, max_seq_len=max_seq_len, seed=options.seed),
        tasks=names,
        limit=options.limit or None,
        log_samples=False,
        task_manager=TaskManager(include_defaults=not all(Path(str(name)).is_file() for name in names)),
    )
    return {} if found is None else {name: dict(each) for name, each in found.get("results", {}).items()}


def _folder(options: EvaluateOptions, trained: LoadedRun) -> Path:
    """Makes the folder of the results before the evaluation, so that an unwritable folder is reported at once."""
    folder = options.out or trained.run_folder / "evaluations"
    make_writable(folder, option=f"--out {folder}")
    return folder


def _keep(folder: Path, step: int, record: dict[str, Any]) -> Path:
    number = 1
    while True:
        path = folder / f"step_{step}_{number}.json"
        try:
            with path.open("x") as file:
                json.dump(record, file, indent=1)
            return path
        except FileExistsError:
            number += 1


def _show(options: EvaluateOptions, record: dict[str, Any], path: Path) -> None:
    if options.as_json:
        print(json.dumps(record))
        return
    console = Console(width=None if Console().is_terminal else 110)
    if "tasks" in record:
        rotated = ", right under each rotation" if options.rotations else ""
        table = Table(title=f"Accuracy after {record['step']} steps, {record['split']} questions{rotated}")
        for name in ("task", "questions", "chance", *MEASURES):
            table.add_column(name, justify="left" if name == "task" else "right")
        for name, task in record["tasks"].items():
            table.add_row(
                name, str(task["questions"]), f"{task['chance']:.1%}", *(_cell(task[measure]) for measure in MEASURES)
            )
        table.add_section()
        table.add_row("mean", "", "", *(_cell(record["mean"][measure]) for measure in MEASURES))
        console.print(table)
    for name, found in record.get("harness", {}).items():
        values = "  ".join(f"{key}={value:.4f}" for key, value in found.items() if isinstance(value, float))
        console.print(f"{name}: {values}", highlight=False)
    print(path)


def _cell(found: dict[str, Any]) -> str:
    low, high = found["interval"]
    return f"{found['accuracy']:.1%} [{low:.1%}, {high:.1%}]"


if __name__ == "__main__":
    run_command(main)
