"""On transformers models `attach` counts the choices of the models' routers, and does not change training."""

import copy
import functools
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from moe_dist.errors import ConfigError
from moe_dist.monitor import attach
from moe_dist.monitor.attached.routers import Counts, find_routers
from moe_dist.monitor.sinks.jsonl import read_lines
from moe_dist.monitor.trace.reader import read_trace
from tests.support.cover import full
from tests.support.messages import refused
from tests.support.syncs import host_syncs
from tests.support.tiny_hf import VOCAB, tiny_model

GUIDE = (Path(__file__).parents[3] / "docs" / "monitoring.md").read_text()
FAMILIES = ("mixtral", "olmoe", "qwen3_moe", "gpt_oss plain")
EXPERTS, LAYERS = 8, 2


def batch_of(seed: int, *, batch: int = 2, length: int = 9) -> dict[str, Tensor]:
    """Returns token ids. The second sequence ends with three tokens of padding."""
    tokens = torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(tokens)
    mask[1, -3:] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def step_of(model: nn.Module, seeds: tuple[int, ...], **options: Any) -> list[Any]:
    """Runs forward and backward of some micro-batches. Returns the outputs."""
    outputs = []
    for seed in seeds:
        batch = batch_of(seed)
        outputs.append(model(**batch, labels=batch["input_ids"], use_cache=False, **options))
        outputs[-1].loss.backward()
    return outputs


@dataclass
class Counted:
    """The oracle counts in loops over tokens, from the router logits that a model returns."""

    choices: np.ndarray = field(default_factory=lambda: np.zeros((LAYERS, EXPERTS), np.int64))
    entropy: np.ndarray = field(default_factory=lambda: np.zeros(LAYERS))
    tokens: int = 0
    ids: list[list[list[int]]] = field(default_factory=list)  # indexed by token and layer
    weights: list[list[list[float]]] = field(default_factory=list)

    def add(self, output: Any, mask: Tensor, top_k: int, *, normalised: bool) -> None:
        for token, real in enumerate(mask.flatten().tolist()):
            if not real:
                continue
            self.tokens += 1
            ids, weights = [], []
            for layer, logits in enumerate(output.router_logits):
                probs = logits[token].detach().double().softmax(0).tolist()
                ids.append(sorted(range(EXPERTS), key=lambda expert: -probs[expert])[:top_k])
                self.entropy[layer] -= sum(p * np.log(p) for p in probs)
                total = sum(probs[expert] for expert in ids[-1]) if normalised else 1.0
                weights.append([probs[expert] / total for expert in ids[-1]])
                for expert in ids[-1]:
                    self.choices[layer, expert] += 1
            self.ids.append(ids)
            self.weights.append(weights)


def checkpointed(model: nn.Module, *, reentrant: bool) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})  # pyright: ignore
    if reentrant:
        model.enable_input_require_grads()  # pyright: ignore


MODES: dict[str, Callable[[nn.Module], Any]] = {
    "plain": lambda _: None,
    "recompute": functools.partial(checkpointed, reentrant=False),
    "recompute reentrant": functools.partial(checkpointed, reentrant=True),
}
CASES = [(family, "plain") for family in FAMILIES] + [("mixtral", mode) for mode in MODES if mode != "plain"]


@pytest.mark.parametrize(("family", "mode"), CASES)
def test_numbers_are_those_of_the_models_own_outputs(family: str, mode: str, tmp_path: Path) -> None:
    model = tiny_model(family).train()
    twin = copy.deepcopy(model)
    for each in (model, twin):
        MODES[mode](each)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, twin)]
    config: Any = model.config
    top_k, normalised = config.num_experts_per_tok, getattr(config, "norm_topk_prob", True)
    with attach(model, tmp_path, sinks=["jsonl"], trace_every=1, trace_tokens=None) as watch:
        for seeds in ((1, 2), (3,)):
            oracle = Counted()
            for seed in seeds:
                with torch.no_grad():
                    output = twin(**batch_of(seed), output_router_logits=True)
                oracle.add(output, batch_of(seed)["attention_mask"], top_k, normalised=normalised)
            outputs, expected = step_of(model, seeds), step_of(twin, seeds)
            for got, want in zip(outputs, expected, strict=True):
                assert torch.equal(got.logits, want.logits)
            for a, b in zip(model.parameters(), twin.parameters(), strict=True):
                assert (a.grad is None) == (b.grad is None)
                assert a.grad is None or torch.equal(a.grad, b.grad)  # pyright: ignore[reportArgumentType]
            model.eval()
            with torch.no_grad():
                model(**batch_of(9))  # evaluations are not counted
            model.train()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            record = watch.step(outputs[-1].loss, lr=0.1)
            assert np.array_equal(record.arrays["choices_LC"], oracle.choices)
            assert record.arrays["tokens_LG"].tolist() == [[oracle.tokens]] * LAYERS
            assert np.allclose(record.arrays["entropy_LG"][:, 0], oracle.entropy / oracle.tokens, rtol=1e-5)
            assert record.scalars["loss/total"] == pytest.approx(outputs[-1].loss.item())
            assert record.scalars["optim/lr"] == 0.1
    trace = read_trace(tmp_path)
    assert trace.steps == (1, 2)
    found = trace.step(2)
    assert found.ids.tolist() == oracle.ids
    assert np.allclose(found.weights, np.array(oracle.weights), atol=1e-3)
    real = batch_of(3)["attention_mask"].bool()
    assert found.tokens["token"].tolist() == batch_of(3)["input_ids"][real].tolist()
    assert found.tokens["position"].tolist() == [*range(9), *range(6)]
    assert found.tokens["sequence"].tolist() == [4] * 9 + [5] * 6  # step 1 had four sequences
    for line in read_lines(tmp_path / "metrics.jsonl"):
        assert line["arrays"]["choices_LC"] == trace.step(line["step"]).choices().tolist()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_loops_of_the_guide_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import Trainer, TrainingArguments

    monkeypatch.chdir(tmp_path)
    loop, callback = (code for code in re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL) if "attach" in code)
    model = tiny_model("mixtral").train()
    scope: dict[str, Any] = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.01)}
    exec(loop, {**scope, "batches": [{**batch_of(seed), "labels": batch_of(seed)["input_ids"]} for seed in (1, 2)]})
    shutil.move("runs/mixtral", "first")
    rows = [{"input_ids": row, "labels": row} for seed in range(2) for row in batch_of(seed)["input_ids"]]
    arguments = TrainingArguments("trainer", max_steps=2, per_device_train_batch_size=2, report_to=[], save_strategy="no",
                                  disable_tqdm=True, use_cpu=True)  # fmt: skip
    exec(callback, {**scope, "trainer": Trainer(model, arguments, train_dataset=rows)})  # pyright: ignore
    for folder, tokens in (("first", 15), ("runs/mixtral", 18)):
        lines = list(read_lines(Path(folder) / "metrics.jsonl"))
        assert [line["arrays"]["tokens_LG"][0][0] for line in lines] == [tokens, tokens]
        assert read_trace(folder).steps == (1,)


def test_probabilities_and_absent_choices_are_read() -> None:
    """Routers of some families return probabilities in the place of logits. An id outside [0, E) is not counted."""
    model = tiny_model("mixtral").train()
    routers = find_routers(model)
    logits, weights, ids = torch.randn(5, EXPERTS), torch.rand(5, 2), torch.tensor([[0, 1]] * 3 + [[EXPERTS, 2], [-1, -1]])
    sums = []
    for scores in (logits, logits.softmax(-1)):
        counts = Counts(routers)
        counts.add(0, routers.kind.read(routers.modules[0], (), (scores, weights, ids)))
        sums.append(counts.take()[0][0])
    assert sums[0][:EXPERTS].tolist() == [3, 3, 1, 0, 0, 0, 0, 0]
    assert sums[0][EXPERTS] == 5
    assert torch.allclose(sums[0], sums[1], rtol=1e-5)


def test_detaching_removes_every_hook_and_copies_are_not_watched(tmp_path: Path) -> None:
    model = tiny_model("mixtral").train()
    hooks = lambda: sum(len(each._forward_hooks) + len(each._forward_pre_hooks) for each in model.modules())  # noqa: E731
    before = hooks()
    watch = attach(model, tmp_path, sinks=["jsonl"], trace_every=0)
    assert hooks() == before + LAYERS + 2
    for each in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        step_of(each, (1,))
    record = watch.step()
    assert record.arrays["choices_LC"].sum() == 0
    assert record.scalars["loss/total"] is None
    watch.detach()
    watch.detach()
    assert hooks() == before
    attach(model, tmp_path / "again", sinks=[], trace_every=0).detach()


def test_the_forwards_wait_for_nothing_and_a_step_waits_once(tmp_path: Path) -> None:
    model = tiny_model("mixtral").train()
    with host_syncs() as alone:
        loss = step_of(model, (1,))[0].loss
    with attach(model, tmp_path, sinks=[], trace_every=2) as watch:
        step_of(model, (1,))
        watch.step(loss)
        with host_syncs() as watched:
            step_of(model, (1,))
        assert watched == alone
        with host_syncs() as seen:
            watch.step(loss, grad_norm=torch.tensor(1.0))
        assert seen == ["cpu", "numpy"]


@pytest.mark.parametrize("mode", ["eval", "copy"])
def test_a_step_without_tokens_is_told_once_with_its_cause(tmp_path: Path, mode: str) -> None:
    model = tiny_model("mixtral").train(mode != "eval")
    with attach(model, tmp_path, sinks=("jsonl",), trace_every=0) as watch:
        for _ in range(2):
            step_of(copy.deepcopy(model) if mode == "copy" else model, (1,))
            watch.step()
        model.train()
        step_of(model, (1,))
        record = watch.step()
    lines = [line for line in read_lines(tmp_path / "metrics.jsonl") if line["kind"] == "hint"]
    assert [line["step"] for line in lines] == [1]
    assert "attach counted no token in this step: " in lines[0]["text"]
    assert {"eval": "eval_mode=True", "copy": "a copy of the model"}[mode] in lines[0]["text"]
    assert record is not None
    assert record.arrays["tokens_LG"].all()


def test_evaluations_count_if_asked(tmp_path: Path) -> None:
    model = tiny_model("mixtral").eval()
    with attach(model, tmp_path, sinks=[], trace_every=0, eval_mode=True) as watch, torch.no_grad():
        model(**batch_of(1))
        record = watch.step()
    assert record is not None
    assert record.arrays["tokens_LG"].tolist() == [[15]] * LAYERS


def compiled_layer(model: Any) -> None:
    for layer in model.model.layers:
        layer.forward = torch.compile(layer.forward, backend="eager")


# Way to compile -> function that compiles a part of the model, and returns what the loop calls if it is not the model
COMPILED: dict[str, Callable[[Any], Any]] = {
    "wrapped": lambda model: torch.compile(model, backend="eager"),
    "in place": lambda model: model.compile(backend="eager"),
    "forward of a layer": compiled_layer,
}


@pytest.mark.parametrize(("way", "inner"), [*(full(way, False) for way in COMPILED), full("wrapped", True)])
def test_a_model_that_ran_compiled_is_counted_like_a_plain_one(tmp_path: Path, way: str, inner: bool) -> None:
    """The first pass before `attach` has the shapes of the later passes, so that nothing else makes torch compile again."""
    plain = tiny_model("mixtral").train()
    counts = []
    for name in ("plain", "compiled"):
        model = copy.deepcopy(plain)
        runs = model
        if name == "compiled" and (wrapper := COMPILED[way](model)) is not None:
            runs = wrapper
        step_of(runs, (1,))
        with attach(model if inner else runs, tmp_path / name, sinks=["jsonl"], trace_every=0) as watch:
            for seed in (1, 2):
                step_of(runs, (seed,))
                record = watch.step()
                assert record is not None
                counts.append(record.arrays["choices_LC"].tolist())
    assert counts[:2] == counts[2:]
    step_of(runs, (3,))  # compiles again, so that nothing is counted
    assert not watch._counts.take()[0].any()


def test_bad_input_is_named(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    with refused(ConfigError, "Linear has no router of a known class", "router_logits", "ROUTERS"):
        attach(nn.Linear(2, 2), tmp_path / "a")
    with attach(model, tmp_path / "b", sinks=["jsonl"]) as watch:
        with refused(ConfigError, "model.layers.0.mlp.gate is watched already", "detach()"):
            attach(model, tmp_path / "c")
        watch.step()
    with refused(ConfigError, "has records up to step 1", "last_step=N"):
        attach(model, tmp_path / "b")
    # writes neither metrics.jsonl nor a trace
    attach(model, tmp_path / "shown", sinks=["tensorboard"], trace_every=0).detach()
    with refused(ConfigError, "has TensorBoard events", "last_step=N"):
        attach(model, tmp_path / "shown", sinks=["tensorboard"], trace_every=0)
    with refused(ConfigError, "sinks: 'tensorbord' is unknown", "tensorboard"):
        attach(model, tmp_path / "d", sinks=["tensorbord"])
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "tensorboard").touch()
    with refused(ConfigError, "sinks: 'tensorboard' cannot be opened"):
        attach(model, tmp_path / "f")
    with refused(ConfigError, "trace_every=-1"):
        attach(model, tmp_path / "g", trace_every=-1)
    other = tiny_model("olmoe")
    with refused(ConfigError, "records of another model"):
        attach(other, tmp_path / "b", last_step=1)
    both = nn.ModuleList([model, other])
    with refused(ConfigError, "(8, 3)", "(8, 2)", "one shape"):
        attach(both, tmp_path / "h")


def test_a_training_goes_on_in_its_folder(tmp_path: Path) -> None:
    model = tiny_model("mixtral").train()
    for last_step, steps in ((0, 3), (2, 2)):
        with attach(model, tmp_path, sinks=["jsonl"], trace_every=1, last_step=last_step) as watch:
            for _ in range(steps):
                step_of(model, (last_step,))
                watch.step()
    lines = list(read_lines(tmp_path / "metrics.jsonl"))
    trace = read_trace(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert trace.steps == (1, 2, 3, 4)
    for line in lines:
        assert trace.step(line["step"]).choices().tolist() == line["arrays"]["choices_LC"]
