"""The model as lm-evaluation-harness sees it: against its own classes where it is installed, else against its interface."""

import abc
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from moe_dist.errors import ConfigError
from moe_dist.evaluation.likelihood import Continuation, Likelihood
from moe_dist.generation.generate import Generator
from moe_dist.generation.material import Material
from moe_dist.trained import Trained, find_trained


class StandIn(abc.ABC):
    """The part of lm_eval.api.model.LM (0.4.13) that a model meets."""

    def __init__(self) -> None:
        self.cache_hook = SimpleNamespace(add_partial=lambda *_: None)

    @abc.abstractmethod
    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]: ...

    @abc.abstractmethod
    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]: ...

    @abc.abstractmethod
    def generate_until(self, requests: list[Any]) -> list[str]: ...


@dataclass(frozen=True)
class Asked:
    """What is used of an lm_eval.api.instance.Instance."""

    args: tuple[Any, ...]


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    if importlib.util.find_spec("lm_eval") is None:
        for name, members in (
            ("lm_eval", {}),
            ("lm_eval.api", {}),
            ("lm_eval.api.instance", {"Instance": Asked}),
            ("lm_eval.api.model", {"LM": StandIn}),
        ):
            module = ModuleType(name)
            vars(module).update(members)
            monkeypatch.setitem(sys.modules, name, module)
    yield importlib.import_module("moe_dist.evaluation.harness")
    sys.modules.pop("moe_dist.evaluation.harness")


@dataclass
class Parts:
    trained: Trained
    material: Material
    likelihood: Likelihood
    generator: Generator


@pytest.fixture(scope="module")
def parts(own_run: Path) -> Parts:
    trained = find_trained(own_run)
    model = trained.load(torch.device("cpu"))
    options: dict[str, Any] = {"group_of_modality": trained.group_of_modality, "max_seq_len": 192}
    material = Material(trained.config.data.path, trained.manifest, vocab_size=trained.config.model.vocab_size)
    return Parts(
        trained, material, Likelihood(model, trained.manifest, **options), Generator(model, material.grammar, **options)
    )


def made(harness: ModuleType, parts: Parts, max_seq_len: int = 192) -> Any:
    return harness.HarnessModel(parts.likelihood, parts.generator, parts.material, max_seq_len=max_seq_len)


def nats(parts: Parts, context: list[int], tokens: list[int]) -> float:
    return parts.likelihood([Continuation(context, tokens)])[0].nats


def test_loglikelihood(harness: ModuleType, parts: Parts) -> None:
    model, prompt = made(harness, parts), parts.material.text_prompt
    asked = [Asked(("text", " 12")), Asked(("", "text")), Asked(("text ", "12")), Asked(("x" * 500, " y"))]
    scores = model.loglikelihood(asked)
    assert scores[0] == scores[2]  # a space between belongs to the continuation
    assert scores[0][0] == pytest.approx(nats(parts, prompt("text"), prompt(" 12")[1:]), rel=1e-5)
    assert scores[1][0] == pytest.approx(nats(parts, prompt(""), prompt("text")[1:]), rel=1e-5)
    bos, *long = prompt("x" * 500)
    room = 192 + 1 - len(prompt(" y")[1:])
    assert scores[3][0] == pytest.approx(nats(parts, [bos, *long[-(room - 1) :]], prompt(" y")[1:]), rel=1e-5)
    with pytest.raises(ConfigError, match="a choice of the task is"):
        model.loglikelihood([Asked(("", "abc " * 200))])


def test_rolling_scores_each_token_once(harness: ModuleType, parts: Parts) -> None:
    text = "text 1 text 2 text 3 text 4"
    bos, *tokens = parts.material.text_prompt(text)
    whole, in_windows, empty = (
        made(harness, parts).loglikelihood_rolling([Asked((text,))])[0],
        made(harness, parts, max_seq_len=5).loglikelihood_rolling([Asked((text,))])[0],
        made(harness, parts).loglikelihood_rolling([Asked(("",))])[0],
    )
    assert whole == pytest.approx(nats(parts, [bos], tokens), rel=1e-6)
    before, expected = [bos], 0.0
    for first in range(0, len(tokens), 5):
        scored = tokens[first : first + 5]
        expected += nats(parts, before[-(6 - len(scored)) :], scored)
        before += scored
    assert in_windows == pytest.approx(expected, rel=1e-5)
    assert empty == 0.0


def test_generation_stops_and_knows_its_options(harness: ModuleType, parts: Parts) -> None:
    model = made(harness, parts)
    (text,) = model.generate_until([Asked(("text 1", {"until": [], "max_gen_toks": 12, "do_sample": False}))])
    assert len(text) > 2
    (cut,) = model.generate_until([Asked(("text 1", {"until": [text[2]], "max_gen_toks": 12}))])
    assert cut == text.partition(text[2])[0]
    with pytest.raises(ConfigError, match="generation_kwargs num_beams: not known here"):
        model.generate_until([Asked(("text", {"until": ["."], "num_beams": 4}))])
