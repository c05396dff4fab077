"""The model class for lm-evaluation-harness. test_harness_parity.py compares it with the harness's own class."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance

from moe_dist.errors import ConfigError
from moe_dist.inference.generate import Generator
from moe_dist.inference.harness import HarnessModel
from moe_dist.inference.likelihood import Continuation, Likelihood
from moe_dist.inference.loaded_run import LoadedRun, find_trained
from moe_dist.inference.vocabulary import Vocabulary
from tests.support.messages import refused

pytestmark = pytest.mark.slow


@dataclass
class Parts:
    trained: LoadedRun
    vocabulary: Vocabulary
    likelihood: Likelihood
    generator: Generator


@pytest.fixture(scope="module")
def parts(own_run: Path) -> Parts:
    trained = find_trained(own_run)
    model = trained.load(torch.device("cpu"))
    options: dict[str, Any] = {"group_of_modality": trained.group_of_modality, "max_seq_len": 192}
    vocabulary = Vocabulary(trained.config.data.path, trained.manifest, vocab_size=trained.config.model.vocab_size)
    return Parts(
        trained, vocabulary, Likelihood(model, trained.manifest, **options), Generator(model, vocabulary.grammar, **options)
    )


def made(parts: Parts, max_seq_len: int = 192) -> HarnessModel:
    return HarnessModel(parts.likelihood, parts.generator, parts.vocabulary, max_seq_len=max_seq_len)


def asked(arguments: tuple[Any, ...]) -> Instance:
    return Instance("loglikelihood", {}, arguments, 0)  # the model reads only the arguments


def nats(parts: Parts, context: list[int], tokens: list[int]) -> float:
    return parts.likelihood([Continuation(context, tokens)])[0].nats


def test_loglikelihood(parts: Parts) -> None:
    model, prompt = made(parts), parts.vocabulary.text_prompt
    requests = [asked(("text", " 12")), asked(("", "text")), asked(("text ", "12")), asked(("x" * 500, " y"))]
    scores = model.loglikelihood(requests)
    assert scores[0] == scores[2]  # a space in between belongs to the continuation
    assert scores[0][0] == pytest.approx(nats(parts, prompt("text"), prompt(" 12")[1:]), rel=1e-5)
    assert scores[1][0] == pytest.approx(nats(parts, prompt(""), prompt("text")[1:]), rel=1e-5)
    bos, *long = prompt("x" * 500)
    room = 192 + 1 - len(prompt(" y")[1:])
    assert scores[3][0] == pytest.approx(nats(parts, [bos, *long[-(room - 1) :]], prompt(" y")[1:]), rel=1e-5)
    with refused(ConfigError):
        model.loglikelihood([asked(("", "abc " * 200))])


def test_rolling_scores_each_token_once(parts: Parts) -> None:
    text = "text 1 text 2 text 3 text 4"
    bos, *tokens = parts.vocabulary.text_prompt(text)
    whole, in_windows, empty = (
        made(parts).loglikelihood_rolling([asked((text,))])[0],
        made(parts, max_seq_len=5).loglikelihood_rolling([asked((text,))])[0],
        made(parts).loglikelihood_rolling([asked(("",))])[0],
    )
    assert whole == pytest.approx(nats(parts, [bos], tokens), rel=1e-6)
    before, expected = [bos], 0.0
    for first in range(0, len(tokens), 5):
        scored = tokens[first : first + 5]
        expected += nats(parts, before[-(6 - len(scored)) :], scored)
        before += scored
    assert in_windows == pytest.approx(expected, rel=1e-5)
    assert empty == 0.0


def test_generation_stops_and_knows_its_options(parts: Parts) -> None:
    model = made(parts)
    (text,) = model.generate_until([asked(("text 1", {"until": [], "max_gen_toks": 12, "do_sample": False}))])
    assert len(text) > 2
    (cut,) = model.generate_until([asked(("text 1", {"until": [text[2]], "max_gen_toks": 12}))])
    assert cut == text.partition(text[2])[0]
    with refused(ConfigError):
        model.generate_until([asked(("text", {"until": ["."], "num_beams": 4}))])
