"""Compares a model before and after it was adapted to fewer experts, and judges the comparison (docs/adapt.md):

python -m research.experiments.adapted BEFORE AFTER --tokenizer FOLDER --data FOLDER --out FILE

Both models score the same held-out sequences and the same questions about words from WordNet. Differences are paired. Their
95 % intervals come from a bootstrap over sequences, or over the questions of each task."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from tokenizers import Tokenizer

from moe_dist.config.schema import Config
from moe_dist.data.indexed import IndexedSplit
from moe_dist.errors import ConfigError
from moe_dist.formats.tokenizer_file import read_tokenizer
from moe_dist.inference.likelihood import Continuation
from moe_dist.inference.loaded_run import LoadedRun, causal_problems, find_trained
from moe_dist.inference.multiple_choice import Prompts, ask, results, write
from moe_dist.inference.questions.split import Side, make_questions
from moe_dist.runtime.command_line import reports_errors, run_command
from research.experiments.instructed import check_new
from research.questions.sources import FAMILIES, WORDNET, make_facts

RESAMPLES = 10_000
MOST_SHARE, MOST_LOSS, MOST_ACCURACY = 0.55, 0.2, 0.1  # limits of the rules in `verdicts`


@dataclass
class Words:
    """The tokenizer of a Hugging Face folder, with the interface that `Prompts` needs. Prompts have no begin-of-document
    token, because only data sets of moe_dist have this token."""

    tokenizer: Tokenizer

    def text_prompt(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids


@dataclass
class Measured:
    """The results of one model: nats per token of each held-out sequence, number of experts, and answers by task."""

    nats_S: np.ndarray
    true_experts: float  # number of true experts per token on the held-out sequences, mean over the MoE layers
    share: float  # mean fraction of the group's true experts that a token takes
    right: dict[str, np.ndarray]  # for each task, a bool for each question: whether the answer was right
    record: dict[str, Any]


@dataclass
class _Load:
    """Counts how often all layers of a model with one expert group choose a true expert."""

    num_experts: int
    counts: list[float] = field(default_factory=lambda: [0.0, 0.0])  # choices, tokens

    def __call__(self, model: object, inputs: object, output: tuple[Any, Any]) -> None:
        for report in output[1]:
            self.counts[0] += float(report.counts.choices_LC[0][: self.num_experts].sum())
            self.counts[1] += float(report.counts.tokens_LG.sum())


def heldout(trained: LoadedRun, *, sequences: int, length: int) -> list[Continuation]:
    """Returns evenly spaced pieces of the held-out documents: one token as context, then `length` tokens to score."""
    pieces = []
    for source in trained.manifest.sources.values():
        assert source.valid is not None, "the data have held-out documents"
        split = IndexedSplit(trained.config.data.path, source.valid)
        for start, tokens in zip(split.starts_D.tolist(), split.lengths_D.tolist(), strict=True):
            pieces += [(split, at) for at in range(start, start + tokens - length, length + 1)]
    chosen = [pieces[index] for index in np.linspace(0, len(pieces) - 1, min(sequences, len(pieces))).astype(int)]
    found = [split.tokens(at, length + 1).tolist() for split, at in chosen]
    return [Continuation(tokens[:1], tokens[1:]) for tokens in found]


def measure(trained: LoadedRun, words: Words, questions: Mapping[str, Any], *, sequences: int, length: int) -> Measured:
    """Scores sequences and questions on this rank in bf16, the precision in which the adapted model was trained."""
    config = trained.config
    parallel = config.parallel.model_copy(update={"precision": "bf16", "device": "cpu"})
    trained = replace(trained, config=config.model_copy(update={"parallel": parallel}))
    likelihood = trained.likelihood(torch.device("cpu"))
    (group,) = config.model.moe.groups.values()
    load = _Load(group.num_experts)
    hook = likelihood.model.register_forward_hook(load)
    pieces = heldout(trained, sequences=sequences, length=length)
    nats_S = np.array([-score.nats / length for score in likelihood(pieces)])
    hook.remove()
    prompts = Prompts(words, listed=False)  # pyright: ignore[reportArgumentType]
    answered = {}
    for task, asked in questions.items():
        written = write(asked, prompts, rotations=False, max_seq_len=config.model.max_seq_len)
        answered[task] = ask(asked, written, likelihood)
    true_experts = load.counts[0] / load.counts[1]
    accuracy = results(answered, seed=0)
    for found in accuracy["tasks"].values():  # pyright: ignore[reportAttributeAccessIssue]
        del found["answers"]
    record = {
        "checkpoint": str(trained.folder),
        "step": trained.step,
        "true_experts_per_token": true_experts,
        "experts": group.num_experts,
        "heldout_nats": float(nats_S.mean()),
        "accuracy": accuracy,
    }
    right = {task: np.array([each.right("normalised") for each in found]) for task, found in answered.items()}
    return Measured(nats_S, true_experts, true_experts / group.num_experts, right, record)


def check_one_group(config: Config, folder: Path) -> None:
    """Raises ConfigError if the model has several expert groups, because different groups could use different fractions of
    their experts."""
    if len(groups := config.model.moe.groups) > 1:
        raise ConfigError(
            f"{folder}: model.moe.groups are {', '.join(groups)}: the share of experts is that of one group; "
            "compare models with one group"
        )


def interval(differences: list[np.ndarray]) -> tuple[float, float, float]:
    """Averages the means of the arrays in `differences`. Returns this average and its 95 % bounds, which come from a
    bootstrap that resamples each array."""
    rng = np.random.default_rng(0)
    means = np.mean([each[rng.integers(len(each), size=(RESAMPLES, len(each)))].mean(1) for each in differences], axis=0)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(np.mean([each.mean() for each in differences])), float(low), float(high)


def verdicts(before: Measured, after: Measured) -> dict[str, Any]:
    """Judges the adapted model by three rules. It must compute at most MOST_SHARE of the expert FLOPs. With 95 %
    confidence, its held-out loss may rise by at most MOST_LOSS nats, and its accuracy may fall by at most MOST_ACCURACY."""
    loss = interval([after.nats_S - before.nats_S])
    gain = interval([after.right[task].astype(float) - before.right[task] for task in before.right])
    return {
        "share": {"value": after.share, "passed": after.share <= MOST_SHARE},
        "loss": {"difference": loss, "passed": loss[2] <= MOST_LOSS},
        "accuracy": {"difference": gain, "passed": gain[1] >= -MOST_ACCURACY},
    }


@reports_errors()
def main(
    before: Annotated[Path, typer.Argument(help="Checkpoint of the model that was adapted.")],
    after: Annotated[Path, typer.Argument(help="Run or checkpoint of the adapted model.")],
    tokenizer: Annotated[Path, typer.Option(help="Folder of the Hugging Face model with tokenizer.json.")],
    data: Annotated[Path, typer.Option(help="Data set with the held-out documents.")],
    out: Annotated[Path, typer.Option(help="File for the results, as JSON; it must not exist.")],
    wordnet: Annotated[Path, typer.Option(help="Folder with WordNet's files.")] = WORDNET,
    sequences: Annotated[int, typer.Option(min=2, help="Held-out sequences.")] = 64,
    length: Annotated[int, typer.Option(min=1, help="Tokens of a held-out sequence.")] = 256,
    limit: Annotated[int, typer.Option(min=2, help="Questions of each task.")] = 75,
) -> None:
    """Measure both models and print the verdicts."""
    check_new(out)
    words = Words(read_tokenizer(tokenizer / "tokenizer.json"))
    facts = make_facts(FAMILIES["wordnet"], wordnet=wordnet)
    questions = {task: make_questions(task, each, Side.TEST, seed=0, limit=limit) for task, each in facts.items()}
    measured, found = [], [find_trained(path, data=data, allow=causal_problems) for path in (before, after)]
    for trained in found:
        check_one_group(trained.config, trained.folder)
    for trained in found:
        measured.append(measure(trained, words, questions, sequences=sequences, length=length))
        print(json.dumps(measured[-1].record), flush=True)
    record = {"before": measured[0].record, "after": measured[1].record, "verdicts": verdicts(*measured)}
    with out.open("x") as file:
        json.dump(record, file, indent=1)
    print(json.dumps(record["verdicts"], indent=1))


if __name__ == "__main__":
    run_command(main)
