"""Tests our model class for lm-evaluation-harness. test_harness_parity.py compares it with the harness's own class."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance

from moe_dist.errors import ConfigError
from moe_dist.inference.generate import Generator
from moe_dist.inference.harness import HarnessModel
from moe_dist.inference.likelihood import Likelihood
from moe_dist.inference.loaded_run import find_trained
from moe_dist.inference.vocabulary import Vocabulary
from tests.support.messages import refused

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(own_run: Path) -> HarnessModel:
    trained = find_trained(own_run)
    loaded = trained.load(torch.device("cpu"))
    options: dict[str, Any] = {"group_of_modality": trained.group_of_modality, "max_seq_len": 192}
    vocabulary = Vocabulary(trained.config.data.path, trained.manifest, vocab_size=trained.config.model.vocab_size)
    likelihood = Likelihood(loaded, trained.manifest, **options)
    return HarnessModel(likelihood, Generator(loaded, vocabulary.grammar, **options), vocabulary, max_seq_len=192)


def asked(arguments: tuple[Any, ...]) -> Instance:
    return Instance("loglikelihood", {}, arguments, 0)  # the model reads only the arguments


def test_generation_stops_and_knows_its_options(model: HarnessModel) -> None:
    (text,) = model.generate_until([asked(("text 1", {"until": [], "max_gen_toks": 12, "do_sample": False}))])
    assert len(text) > 2
    (cut,) = model.generate_until([asked(("text 1", {"until": [text[2]], "max_gen_toks": 12}))])
    assert cut == text.partition(text[2])[0]
    with refused(ConfigError):
        model.generate_until([asked(("text", {"until": ["."], "num_beams": 4}))])
    with refused(ConfigError, "model.max_seq_len"):
        model.loglikelihood([asked(("", "abc " * 200))])
    assert model.loglikelihood_rolling([asked(("",))]) == [0.0]
