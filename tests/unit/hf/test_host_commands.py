"""Tests the commands on runs of transformers' models (engine.kind=transformers), from the launcher to the export."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launchers.local import launch
from moe_dist.errors import ConfigError
from moe_dist.formats.manifest import load_manifest
from moe_dist.inference.grammar import GrammarState
from moe_dist.inference.loaded_run import find_trained
from moe_dist.inference.vocabulary import Vocabulary
from moe_dist.monitor.tags import reproducible_part
from moe_dist.runtime.run_folder import RunFolder
from moe_dist.train.start.resume import Progress
from moe_dist.train.start.starting_weights import check_scored
from tests.support.cover import exhaustive, full
from tests.support.engine_run import built_run, take_steps
from tests.support.faults import PROGRAM, fault
from tests.support.hosted import FAMILIES, UNEVEN, hosted_config
from tests.support.invoked import invoke
from tests.support.one_rank import world_of_one
from tests.support.pictured import VOCAB
from tests.support.tiny import write_config
from tests.support.tiny_embedder import tiny_embedder
from tools import evaluate, export_hf, generate, inspect_checkpoint, prepare_router_tuning

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[3]
SETTINGS: dict[str, Any] = {
    **UNEVEN,
    "data.seq_len": 96,
    "train.steps": 6,
    "optimizer.lr": 0.02,
    "loss.balance.scope": "step",
    "checkpoint": {"every": 2, "asynchronous": False},
    "evaluation.every": 100,
    "monitor.sinks": [{"kind": "jsonl"}, {"kind": "tensorboard"}],
}
GREEDY = ("--prompt", "text 1", "--temperature", 0, "--tokens", 12)


@pytest.fixture(scope="module")
def run(own_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a trained run of deepseek_v3. Tests may add results to it."""
    root = tmp_path_factory.mktemp("runs")
    fields = {**FAMILIES["deepseek_v3"], "vocab_size": VOCAB, "max_position_embeddings": 192}
    changes = {"parallel.ep": 1, "data.seq_len": 96}
    config = hosted_config(own_data, root, {"family": "deepseek_v3", "fields": fields}, changes)
    with world_of_one(), built_run(config) as made:
        saver = made.saver()
        saver.restore()
        take_steps(made, 0, 2)
        saver.save(Progress(step=2, position=2 * config.train.global_batch), durable=True)
    return root / "tiny"


def printed(command: Any, *arguments: object) -> str:
    done = invoke(command, *arguments)
    assert done.exit_code == 0, done.output
    return done.stdout


def sampled(run: Path, *options: object) -> Any:
    return json.loads(printed(generate.main, run, *options, "--json").splitlines()[-1])


def likeliest(model: Any, run: Path) -> list[int]:
    """Returns the most likely tokens that the data's grammar allows, by the `generate` of transformers."""
    vocabulary = find_trained(run).vocabulary()
    prompt = torch.tensor([vocabulary.text_prompt("text 1")])
    never = np.flatnonzero(~vocabulary.grammar.allowed_SV[GrammarState.TEXT_ONLY]).tolist()
    options = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": vocabulary.grammar.eos_id}
    own = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), suppress_tokens=never, **options)
    return own[0, prompt.shape[1] :].tolist()


@pytest.mark.full
@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_run_from_a_folder_loses_a_rank_and_goes_on(own_data: Path, questions: Path, tmp_path: Path, family: str) -> None:
    """Ranks have 5 and 3 experts. The records of both attempts equal the records of a run that loses no rank. The run is
    evaluated, and generates the tokens that transformers generates from its export."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    folder, out = tmp_path / "folder", tmp_path / "out"
    fields = {**FAMILIES[family], "vocab_size": VOCAB, "max_position_embeddings": 192, "initializer_range": 0.2}
    AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**fields)).save_pretrained(folder)

    def started(name: str) -> tuple[int, RunFolder]:
        config = hosted_config(own_data, tmp_path / "runs", {"folder": str(folder)}, {**SETTINGS, "run.name": name})
        return launch(write_config(config, tmp_path / f"{name}.yaml"), program=PROGRAM), RunFolder.of(config)

    code, whole = started("undisturbed")
    assert code == 0
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in fault(rank=1, step=4, phase="before_step", kind="kill").items():
            patch.setenv(variable, value)
        assert started("broken")[0] not in (0, 75)
    code, run = started("broken")
    assert code == 0
    assert [each.verdict == 0 for each in run.read_status().attempts] == [False, True]
    assert records(run) == records(whole)
    assert list(run.path.rglob("events.out.tfevents.*"))

    asked = ("--questions", questions, "--limit", 6, "--json", "--out", tmp_path)
    answers = [json.loads(printed(evaluate.main, each.path, *asked))["tasks"] for each in (run, whole)]
    assert answers[0] == answers[1]
    assert [task["questions"] for task in answers[0].values()] == [6, 6]
    printed(export_hf.main, run.path, "--out", out)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert sampled(run.path, *GREEDY)["tokens"] == likeliest(model, run.path)


def records(run: RunFolder) -> list[dict[str, Any]]:
    lines = map(json.loads, run.metrics_jsonl.read_text().splitlines())
    return [reproducible_part(line) for line in lines if line["kind"] != "hint"]  # some hints depend on times


def test_a_picture_is_drawn_without_guidance(run: Path, tmp_path: Path) -> None:
    options = ("--prompt", "odd picture", "--draw", "--out", tmp_path)
    (picture,) = sampled(run, *options)["pictures"]
    assert Path(picture).is_file()
    refused = invoke(generate.main, run, *options, "--guidance", 2)
    assert refused.exit_code == 78
    assert "--guidance 1" in refused.stderr


def test_experts_and_routers_are_shown(run: Path) -> None:
    shown = invoke(inspect_checkpoint.main, run).stdout
    assert re.search(r"experts of experts .* 2 layers x 8 experts x down_proj, gate_up_proj ", shown), shown
    assert re.search(r"│ routers +│ 4 ", shown), shown


def test_a_run_is_evaluated(run: Path, questions: Path, tmp_path: Path) -> None:
    done = printed(evaluate.main, run, "--questions", questions, "--limit", 4, "--out", tmp_path, "--json")
    assert [task["questions"] for task in json.loads(done)["tasks"].values()] == [4, 4]


@pytest.mark.parametrize("family", [full("olmoe"), exhaustive("qwen3_moe"), exhaustive("deepseek_v3")])
def test_routers_of_a_folder_are_tuned_by_commands(own_data: Path, questions: Path, tmp_path: Path, family: str) -> None:
    """Runs the commands of docs/router-tuning.md. The export differs from the folder only in the last layer's router."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    folder, samples, out, path = (tmp_path / name for name in ("folder", "samples", "out", "roma.yaml"))
    fields = {**FAMILIES[family], "vocab_size": VOCAB, "max_position_embeddings": 192}
    AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**fields)).save_pretrained(folder)
    shutil.copyfile(own_data / "tokenizer.json", folder / "tokenizer.json")
    changes = {"train.only": "routers", "router_tuning": {"data": str(samples), "last_layers": 1}}
    changes |= {"data.seq_len": 96, "loss": {"balance": {"schedule": [[0, 0.0]]}, "z": 0.0}}
    write_config(hosted_config(own_data, tmp_path, {"folder": str(folder)}, changes), path)

    asked = ("--questions", questions, "--limit", 24, "--json")
    before = json.loads(printed(evaluate.main, path, *asked))
    embedder = ("--embedder", tiny_embedder(tmp_path / "embedder"))
    printed(prepare_router_tuning.main, path, "--questions", questions, "--no-rotations", *embedder, "--out", samples)
    assert launch(path) == 0
    after = json.loads(printed(evaluate.main, tmp_path / "tiny", *asked))
    assert (before["step"], after["step"]) == (0, 4)
    assert before["tasks"].keys() == after["tasks"].keys()
    assert len(list((tmp_path / "tiny/evaluations").glob("step_?_1.json"))) == 2
    printed(export_hf.main, tmp_path / "tiny", "--out", out)
    old, new = (AutoModelForCausalLM.from_pretrained(each, dtype=torch.float32).state_dict() for each in (folder, out))
    changed = [name for name, tensor in new.items() if not torch.equal(tensor, old[name])]
    assert changed == [f"model.layers.{fields['num_hidden_layers'] - 1}.mlp.gate.weight"]
    with pytest.raises(ConfigError, match="made from the weights"):
        check_scored(hosted_config(own_data, tmp_path, {"folder": str(out)}, changes))


def test_adapters_are_used_by_commands(own_data: Path, questions: Path, tmp_path: Path) -> None:
    """A run that starts with a trained run's exported adapters gives equal answers. PEFT's model generates equal tokens."""
    from peft import PeftModel
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    base, out, path = (tmp_path / name for name in ("base", "out", "lora.yaml"))
    fields = {**FAMILIES["qwen3_moe"], "vocab_size": VOCAB, "max_position_embeddings": 192}
    AutoModelForCausalLM.from_config(CONFIG_MAPPING["qwen3_moe"](**fields)).save_pretrained(base)

    def begin_with(folder: Path | None) -> None:
        lora = {"rank": 2, "alpha": 64.0, "targets": ["o_proj"], "parameters": ["experts.down_proj"]}
        model = {"folder": str(base), "lora": {**lora, "folder": folder and str(folder)}}
        changes = {"train.only": "adapters", "data.seq_len": 96, "loss": {"balance": {"schedule": [[0, 0.0]]}, "z": 0.0}}
        write_config(hosted_config(own_data, tmp_path, model, {**changes, "optimizer.lr": 0.05}), path)

    def used(run: Path) -> tuple[Any, list[int]]:
        told = printed(evaluate.main, run, "--questions", questions, "--limit", 12, "--json", "--out", tmp_path)
        return json.loads(told)["tasks"], sampled(run, *GREEDY)["tokens"]

    begin_with(None)
    before = used(path)
    assert launch(path) == 0
    trained = used(tmp_path / "tiny")
    printed(export_hf.main, tmp_path / "tiny", "--out", out, "--adapters")
    begin_with(out)
    assert used(path) == trained != before
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), out)
    assert likeliest(model, tmp_path / "tiny") == trained[1] != before[1]


def test_a_folders_tokenizer_reads_prompts(own_data: Path) -> None:
    """If the data name no tokenizer, prompts use the model folder's tokenizer, which recognises special tokens."""
    manifest = load_manifest(own_data)
    own = Vocabulary(own_data, manifest, vocab_size=VOCAB)
    unnamed = manifest.model_copy(update={"tokenizer": None})
    of_folder = Vocabulary(own_data, unnamed, vocab_size=VOCAB, model_folder=str(own_data))
    assert of_folder.text_prompt("<bos>text 1") == own.text_prompt("text 1")
    assert of_folder.text(own.text_prompt("text 1")[1:]) == "text 1"


@pytest.mark.full
def test_the_readmes_commands_for_an_own_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the commands in order on the folder that docs/examples/tiny_qwen3_moe.py makes. Training takes two steps."""
    text = (ROOT / "README.md").read_text()
    (commands,) = re.findall(r"```console\n(\$ moe-dist prepare-data --tokenizer.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    made = [sys.executable, str(ROOT / "docs/examples/tiny_qwen3_moe.py"), "MODEL", "chats.jsonl"]
    subprocess.run(made, check=True, capture_output=True)
    for line in commands.splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        trial = ["train.steps=2", "evaluation.every=2", "checkpoint.every=2"] if "launch" in words else []
        done = subprocess.run(
            [sys.executable, "-m", "moe_dist", *words[1:], *trial], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    assert (tmp_path / "tuned/config.json").exists()
    assert (tmp_path / "runs/fine_tune/report.html").exists()
