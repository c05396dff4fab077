"""lm-evaluation-harness gives the same results with our model class as with its own class for Hugging Face models.

A run with random weights is exported, gets a Hugging Face tokenizer, and is loaded by `HFLM`. tests/unit/hf tests all
other forms of an export.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lm_eval.api.instance import Instance

from moe_dist.hf.exporting import export_model
from moe_dist.inference.generate import Generator
from moe_dist.inference.harness import HarnessModel
from moe_dist.inference.likelihood import Likelihood
from moe_dist.inference.loaded_run import find_trained
from moe_dist.inference.vocabulary import Vocabulary
from tests.support.one_rank import OneRank, world_of_one
from tests.support.pictured import VOCAB

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
LONGEST = 96
QUESTIONS = 12


@dataclass(frozen=True)
class Both:
    """`ours` is a run in our model class. `theirs` and `unmarked` are the run's export in the harness's class. `theirs`
    puts the begin token before each context. `unmarked` does not, because the harness adds the token to running texts
    itself."""

    run: Path
    ours: HarnessModel
    theirs: Any
    unmarked: Any


ONE = {"all": {"num_experts": 4, "top_k": 2, "ffn_dim": 16, "modalities": ["text", "image"]}}
# Groups with null, identity and constant experts, and a selection bias.
GROUPS = {
    "text": {"num_experts": 4, "num_null": 3, "num_identity": 1, "num_constant": 1, "top_k": 3, "ffn_dim": 16},
    "image": {"num_experts": 2, "num_null": 2, "top_k": 2, "ffn_dim": 24},
}
# An export as a family of transformers, and an export with our model code.
FORMS: dict[str, dict[str, Any]] = {  # form of the export -> changes of the model
    "mixtral": {},
    "moe_dist": {"model__moe__groups": GROUPS, "model__moe__router": {"kind": "top_k", "selection_bias": True}},
}


@pytest.fixture(scope="module", params=FORMS)
def both(request: pytest.FixtureRequest, own_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Both:
    from lm_eval.models.huggingface import HFLM  # imports transformers, which takes seconds
    from transformers import PreTrainedTokenizerFast

    root = tmp_path_factory.mktemp("exported")
    shape: dict[str, Any] = {"model__vocab_size": VOCAB, "model__max_seq_len": LONGEST, "data__seq_len": LONGEST}
    form = request.param
    shape |= {"model__moe__groups": ONE, **FORMS[form]}
    with world_of_one():  # large weights, so that log-likelihoods differ by whole nats
        made = OneRank(own_data, root / "runs", model__init_std=0.3, **shape)
        made.train_and_save()
    run = made.folder.parent
    assert export_model(run, root / "hf", family=form).family == form
    folder = root / "hf"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(own_data / "tokenizer.json"), bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    tokenizer.save_pretrained(folder)

    trained = find_trained(run, data=own_data)
    model = trained.load(torch.device("cpu"))
    vocabulary = Vocabulary(trained.config.data.path, trained.manifest, vocab_size=VOCAB)
    shared: dict[str, Any] = {"group_of_modality": trained.group_of_modality, "max_seq_len": LONGEST}
    likelihood, generator = Likelihood(model, trained.manifest, **shared), Generator(model, vocabulary.grammar, **shared)
    settings: dict[str, Any] = {"device": "cpu", "dtype": "float32", "batch_size": 4, "trust_remote_code": True}
    theirs, unmarked = (
        HFLM(str(folder), tokenizer=str(folder), add_bos_token=marked, **settings) for marked in (True, False)
    )
    return Both(run, HarnessModel(likelihood, generator, vocabulary, max_seq_len=LONGEST), theirs, unmarked)


def asked(kind: Any, arguments: Sequence[tuple[str, ...]]) -> list[Instance]:
    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


def likeliest(model: Any, contexts: Sequence[str]) -> tuple[str, str]:
    """Returns a context and its most likely next token as text. Takes the first context whose token is restored by decoding
    and encoding."""
    for context in contexts:
        ids = model.tok_encode(context)
        token = int(model._model_call(torch.tensor([ids]))[0, -1].argmax())
        text = model.tok_decode([token])
        if model.tok_encode(context + text) == [*ids, token]:
            return context, text
    raise AssertionError("all of them are followed by bytes of no text")


def test_log_likelihoods_of_continuations(both: Both) -> None:
    pairs = [
        ("text", " 12"), ("", "text"), ("text ", "12"), ("text 1\n\ntext", " 4 text 4"), ("naïve ☂", " 7"),
        ("x" * 80, " y"),
    ]  # fmt: skip
    requests = asked("loglikelihood", [*pairs, likeliest(both.theirs, [f"text {number}" for number in range(40)])])
    ours, theirs = both.ours.loglikelihood(requests), both.theirs.loglikelihood(requests)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs] == [*[False] * len(pairs), True]
    assert [nats for nats, _ in ours] == pytest.approx([nats for nats, _ in theirs], abs=1e-4)
    assert max(nats for nats, _ in theirs[: len(pairs)]) < -1.0


def test_log_likelihoods_of_running_texts(both: Both) -> None:
    """One text is longer than the model's window, and one is shorter."""
    requests = asked("loglikelihood_rolling", [("text 1 text 2 " * 40,), ("text",)])
    ours, theirs = both.ours.loglikelihood_rolling(requests), both.unmarked.loglikelihood_rolling(requests)
    assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-4)
    assert theirs[0] < -500.0


def written_tasks(folder: Path) -> str:
    """Writes YAML files of two tasks over questions in a local file. Returns their names, separated by a comma."""
    lines = []
    for number in range(QUESTIONS):
        choices = [f"{number * 7 % 30} text", f"{number * 5 % 30}", "even picture"]
        lines.append(json.dumps({"question": f"text {number} text", "choices": choices, "answer": number % 3}))
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n")
    common: dict[str, Any] = {
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(folder / "questions.jsonl")},
            "cache_dir": str(folder / "cache"),
        },
        "test_split": "test",
        "doc_to_text": "{{question}}",
    }
    tasks = {
        "choices": {
            "output_type": "multiple_choice",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        "endings": {
            "output_type": "loglikelihood",
            "doc_to_target": " {{choices[answer]}}",
            "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
        },
    }
    for name, task in tasks.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **common, **task}))
    return ",".join(str(folder / f"{name}.yaml") for name in tasks)


def measured(model: Any, tasks: str) -> dict[str, Any]:
    """Returns the model's results in each of the harness's tasks."""
    from lm_eval.evaluator import evaluate  # `simple_evaluate` would list the environment's packages each time
    from lm_eval.tasks import TaskManager

    loaded = TaskManager(include_defaults=False).load(tasks.split(","))
    found = evaluate(model, loaded, bootstrap_iters=0)
    return found["results"]


def assert_equal_numbers(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found.keys() == wanted.keys() == {"choices", "endings"}
    for task, metrics in {"choices": ("acc,none", "acc_norm,none"), "endings": ("perplexity,none", "acc,none")}.items():
        for metric in metrics:
            assert found[task][metric] == pytest.approx(wanted[task][metric], rel=1e-4), metric
    assert 0 < found["choices"]["acc,none"] < 1
    assert found["choices"]["sample_len"] == QUESTIONS
    assert found["endings"]["perplexity,none"] > 10


def test_the_harness_measures_the_same_of_the_export(both: Both, tmp_path: Path) -> None:
    tasks = written_tasks(tmp_path)
    assert_equal_numbers(measured(both.ours, tasks), measured(both.theirs, tasks))


@pytest.mark.full
@pytest.mark.parametrize("both", ["mixtral"], indirect=True)
def test_the_command_prints_what_the_harness_measures_of_the_export(both: Both, tmp_path: Path) -> None:
    tasks = written_tasks(tmp_path)
    command = [sys.executable, "-m", "tools.evaluate", str(both.run), "--harness", tasks, "--json"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert_equal_numbers(json.loads(done.stdout.splitlines()[-1])["harness"], measured(both.theirs, tasks))
