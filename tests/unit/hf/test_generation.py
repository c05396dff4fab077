"""With every generation method of transformers, an export with our model code (the served form) gives the same tokens
as the transformers class of the model's family."""

from typing import Any

import pytest
import torch

from moe_dist.hf.exporting import export_model
from moe_dist.hf.importing import import_model
from tests.support.cover import full
from tests.support.served import theirs
from tests.support.tiny_hf import save, tiny_model

NEW = 6
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "without a cache": {"use_cache": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampled beams": {"num_beams": 2, "do_sample": True},
    "static cache": {"cache_implementation": "static"},
    "beams over a static cache": {"cache_implementation": "static", "num_beams": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}


@pytest.fixture(scope="module", params=["mixtral sliding", full("gpt_oss"), full("deepseek_v3")])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A model of the family's transformers class, and the served form of the same weights."""
    root, model = tmp_path_factory.mktemp("models"), tiny_model(request.param).eval()
    import_model(save(model, root / "theirs"), root / "ours")
    export_model(root / "ours", root / "served", family="moe_dist")
    return model, theirs(root / "served", attn_implementation="eager")


def prompts(*, padded: bool) -> dict[str, torch.Tensor]:
    """Returns two prompts. If `padded`, the first is shorter and has padding on its left."""
    tokens = torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(tokens)
    if padded:
        tokens[0, :4], mask[0, :4] = 0, 0
    return {"input_ids": tokens, "attention_mask": mask}


def generated(model: Any, prompt: dict[str, torch.Tensor], options: dict[str, Any]) -> torch.Tensor:
    model.generation_config.eos_token_id = None
    torch.manual_seed(3)
    return model.generate(**prompt, max_new_tokens=NEW, **{"do_sample": False, "pad_token_id": 0, **options})


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_tokens_are_those_of_the_family(both: tuple[Any, Any], way: str, padded: bool) -> None:
    if way == "prompt lookup":  # transformers allows no batches here
        prompt = {name: each[padded:][:1] for name, each in prompts(padded=padded).items()}
    else:
        prompt = prompts(padded=padded)
    wanted, found = (generated(model, prompt, WAYS[way]) for model in both)
    assert torch.equal(found, wanted)
    assert found.shape[1] == prompt["input_ids"].shape[1] + NEW


def test_assisted_decoding_gives_the_model_its_own_tokens(both: tuple[Any, Any]) -> None:
    """An assistant model changes how often the main model runs, but not the main model's greedy tokens. The served form
    may be the main model, the assistant, or both."""
    model, served = both
    prompt = {name: each[:1] for name, each in prompts(padded=False).items()}
    wanted = generated(model, prompt, {})
    for main, assistant in ((served, model), (model, served), (served, served)):
        assert torch.equal(generated(main, prompt, {"assistant_model": assistant}), wanted)


@pytest.mark.full  # compiles on the host
def test_a_compiled_model_computes_the_same(both: tuple[Any, Any]) -> None:
    _, served = both
    tokens = prompts(padded=False)["input_ids"]
    with torch.no_grad():
        wanted = served(tokens, use_cache=False).logits
        found = torch.compile(served, backend="aot_eager")(tokens, use_cache=False).logits
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
