"""When tokens are generated one by one with a cache, the logits equal the logits of a pass over the whole sequence, for
every kind of layer, step and batch."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moe_dist.errors import ConfigError
from moe_dist.formats.manifest import load_manifest
from moe_dist.inference.generate import Generator, Request, Sampling, check_lengths
from moe_dist.inference.grammar import grammar_of
from moe_dist.model.attention import QKNorm
from moe_dist.model.transformer import Transformer
from tests.support.causal_models import evaluated_model
from tests.support.cover import full
from tests.support.layouts import Layout, config_of
from tests.support.messages import refused
from tests.support.tiny import BEGIN_IMAGE, END_IMAGE, EOS, IMAGE_IDS
from tests.support.transformers import make_transformer

VOCAB, CELLS = 64, 16


def whole(model: Transformer, tokens_BS: Tensor) -> Tensor:
    positions = torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS)
    documents = torch.zeros_like(tokens_BS, dtype=torch.int32)
    return model(tokens_BS, positions, documents, group_of(tokens_BS))[0]


def group_of(tokens: Tensor) -> Tensor:
    return (tokens >= IMAGE_IDS[0]).to(torch.int64)


def in_parts(model: Transformer, tokens_BS: Tensor, parts: Sequence[int]) -> Tensor:
    cache = model.make_cache(tokens_BS.shape[0], tokens_BS.shape[1])
    logits, at = [], 0
    for length in parts:
        tokens = tokens_BS[:, at : at + length]
        positions = torch.arange(at, at + length).expand_as(tokens)
        logits.append(model.forward_cached(tokens, positions, group_of(tokens), cache))
        at += length
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("parts", [[1] * 12, [5, 1, 1, 1, 1, 1, 1, 1], [7, 5], [12]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, full(torch.float32)], ids=str)
@pytest.mark.parametrize(
    ("layers", "qk_norm"), [((), "none"), ((0, 1, 2), "full"), ((1,), "head")], ids=["dense", "nulls", "both"]
)
@torch.no_grad()
def test_cached_logits_are_the_whole_ones(
    layers: tuple[int, ...], qk_norm: QKNorm, dtype: torch.dtype, parts: list[int]
) -> None:
    model = make_transformer(moe_layers=layers, qk_norm=qk_norm, dtype=dtype).eval()
    tokens = torch.randint(0, VOCAB, (3, 12), generator=torch.Generator().manual_seed(1))
    tolerance = 1e-10 if dtype is torch.float64 else 1e-5
    expected = whole(model, tokens)
    assert expected.std() > 0.1
    torch.testing.assert_close(in_parts(model, tokens, parts), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("parts", [[1] * 12, [5, 1, 1, 1, 1, 1, 1, 1], [7, 5]], ids=str)
@torch.no_grad()
def test_cached_logits_within_a_window(parts: list[int]) -> None:
    model = make_transformer(moe_layers=(1,), windows=(3, None, 4), dtype=torch.float64).eval()
    tokens = torch.randint(0, VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))
    expected = whole(model, tokens)
    torch.testing.assert_close(in_parts(model, tokens, parts), expected, rtol=0, atol=1e-10)
    unlimited = whole(make_transformer(moe_layers=(1,), dtype=torch.float64).eval(), tokens)
    torch.testing.assert_close(expected[:, :3], unlimited[:, :3], rtol=0, atol=1e-10)
    assert (expected - unlimited)[:, 3:].abs().amax((0, 2)).min() > 1e-3


@torch.no_grad()
def test_padding_within_a_window_stays_finite() -> None:
    model = make_transformer(moe_layers=(1,), windows=(2, 2, 2)).eval()
    tokens, cache = torch.randint(0, VOCAB, (2, 6), generator=torch.Generator().manual_seed(1)), model.make_cache(2, 6)
    group = torch.where(torch.arange(6) < torch.tensor([[2], [6]]), group_of(tokens), -1)
    logits = model.forward_cached(tokens, torch.arange(6).expand(2, 6), group, cache)
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[0, :2], whole(model, tokens[:1, :2])[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("parts", [[1] * 12, [7, 5]], ids=str)
@pytest.mark.parametrize("mixture_of_depths", [None, "rank"])
@pytest.mark.parametrize("causal", ["threshold", "auxiliary"])
@torch.no_grad()
def test_cached_logits_of_experts_that_choose(causal: str, mixture_of_depths: str | None, parts: list[int]) -> None:
    layout = Layout(choice="rank", choice_causal=causal, mixture_of_depths=mixture_of_depths, depth_causal=causal)
    model = evaluated_model(config_of(layout))
    tokens = torch.randint(0, VOCAB, (3, 12), generator=torch.Generator().manual_seed(1))
    expected = whole(model, tokens)
    assert expected.std() > 0.1
    torch.testing.assert_close(in_parts(model, tokens, parts), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_padding_leaves_no_entry_and_shifts_nothing() -> None:
    """Two prompts of 3 and 5 tokens form one batch, and each gets two more tokens. Each row equals that prompt run
    alone."""
    model = make_transformer(moe_layers=(0, 1, 2), dtype=torch.float64).eval()
    tokens = torch.randint(0, VOCAB, (2, 7), generator=torch.Generator().manual_seed(2))
    lengths = [3, 5]
    cache = model.make_cache(2, 7)
    first = tokens[:, :5].clone()
    first[0, 3:] = 0
    positions = torch.arange(5).expand(2, 5)
    group = torch.where(positions < torch.tensor(lengths)[:, None], group_of(first), -1)
    prefilled = model.forward_cached(first, positions, group, cache)
    got = [prefilled[b, lengths[b] - 1] for b in range(2)]
    for step in range(2):
        at = torch.tensor([[length + step] for length in lengths])
        new = tokens.gather(1, at)
        logits = model.forward_cached(new, at, group_of(new), cache)
        for b in range(2):
            expected = whole(model, tokens[b : b + 1, : lengths[b] + step + 1])
            if step == 0:
                torch.testing.assert_close(got[b], expected[0, -2], rtol=0, atol=1e-10)
            torch.testing.assert_close(logits[b, 0], expected[0, -1], rtol=0, atol=1e-10)
    assert cache[0].lengths.tolist() == [5, 7]


def test_a_cache_takes_no_more_than_it_is_made_for() -> None:
    model = make_transformer(moe_layers=()).eval()
    tokens, cache = torch.zeros(1, 4, dtype=torch.int64), model.make_cache(1, 3)
    with refused(ValueError):
        model.forward_cached(tokens, torch.arange(4)[None], tokens, cache)


@pytest.fixture(scope="module")
def generator(tiny_data: str) -> Generator:
    grammar = grammar_of(load_manifest(tiny_data), vocab_size=VOCAB)
    return Generator(make_transformer(moe_layers=(0, 1, 2)), grammar, group_of_modality=[0, 1], max_seq_len=64)


def slow_generate(generator: Generator, prompt: list[int], length: int) -> list[int]:
    """Generates the most likely token each time, with a forward pass over the whole sequence."""
    tokens = list(prompt)
    for _ in range(length):
        logits = whole(generator.model, torch.tensor([tokens]))[0, -1].double()
        logits[~torch.from_numpy(generator.grammar.allowed_SV[1])] = -torch.inf
        tokens.append(int(logits.argmax()))
        if tokens[-1] == EOS:
            break
    return tokens[len(prompt) :]


@torch.no_grad()
def test_the_likeliest_tokens_are_those_of_whole_forwards(generator: Generator) -> None:
    prompts = [[9, 10, 11], [30], [20, BEGIN_IMAGE, *range(48, 48 + CELLS), END_IMAGE, 21]]
    made = generator(prompts, Request(10, Sampling(0.0), text_only=True))
    assert made == [slow_generate(generator, prompt, 10) for prompt in prompts]
    assert not generator.model.training


def test_pictures_are_whole_and_modalities_kept(generator: Generator) -> None:
    grammar = generator.grammar
    made = generator([[9, BEGIN_IMAGE]] * 5 + [[12, 13]] * 20, Request(40, Sampling(1.5), seed=1))
    for number, tokens in enumerate(made):
        picture = tokens[:CELLS] if number < 5 else []
        assert all(IMAGE_IDS[0] <= token < IMAGE_IDS[1] for token in picture)
        whole_document = ([9, BEGIN_IMAGE] if number < 5 else [12, 13]) + tokens
        begun = whole_document.count(BEGIN_IMAGE)
        assert len(grammar.pictures(whole_document)) == begun == whole_document.count(END_IMAGE)
        codes = sum(token >= IMAGE_IDS[0] for token in tokens)
        assert codes == CELLS * begun
        assert EOS not in tokens[:-1]
    assert any(BEGIN_IMAGE in tokens for tokens in made[5:])
    only_one = generator([[9, BEGIN_IMAGE]], Request(CELLS + 1, one_picture=True))
    assert only_one[0][-1] == END_IMAGE
    assert len(only_one[0]) == CELLS + 1


@pytest.mark.slow
def test_seeds_repeat_and_samples_do_not_depend_on_their_number(generator: Generator) -> None:
    request = Request(12, Sampling(1.0, 0.9), seed=7, text_only=True)
    three = generator([[9, 10]] * 3, request)
    assert generator([[9, 10]] * 3, request) == three
    assert generator([[9, 10]] * 5, request)[:3] == three
    assert generator([[9, 10]] * 70, request)[:3] == three  # more than one batch
    assert generator([[9, 10]] * 3, replace(request, seed=8)) != three
    assert len(set(map(tuple, three))) > 1


@pytest.mark.slow
def test_guidance_of_the_captions_own_prompt_changes_nothing(generator: Generator) -> None:
    prompts = [[9, BEGIN_IMAGE], [10, 11, BEGIN_IMAGE]]
    request = Request(CELLS + 1, seed=2, one_picture=True)
    plain = generator(prompts, request)
    assert generator(prompts, replace(request, guidance=3.0), plain=prompts) == plain
    nothing = generator(prompts, replace(request, guidance=0.0), plain=[[30, BEGIN_IMAGE]] * 2)
    assert nothing == generator([[30, BEGIN_IMAGE]] * 2, request)


def test_what_does_not_fit_is_refused() -> None:
    with refused(ConfigError):
        check_lengths([[1] * 60], 5, 64)
    with refused(ConfigError, "model.max_seq_len=64"):
        check_lengths([[1], [1] * 64], 1, 64)
    with refused(ConfigError):
        check_lengths([[]], 1, 64)
    check_lengths([[1] * 60], 4, 64)
