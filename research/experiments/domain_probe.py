"""Measures how much the inputs and the choices of a model's routers tell about the domain of a token. A domain is a data
source.

A linear probe (softmax regression) predicts the domain of a token from the router's input in each layer. It is fitted to
the tokens of every other held-out sequence, and its accuracy is measured on the remaining sequences. The bits of the
choices are the mutual information between the domain and the expert with the largest weight. Both are measured on the
tokens that predict a scored label.

Shape letters: T tokens of a batch, N tokens of all batches, D hidden, C domains, E experts.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moe_dist.data.batch import IGNORED, Batch
from moe_dist.model.transformer import Transformer
from moe_dist.moe.routing.types import ABSENT
from moe_dist.train.objective.loss import forward
from research.experiments.tokens import TokenPairs, recorded_routers

PENALTY = 1e-4  # L2 penalty of the probe's weights, which keeps a fit to separable domains finite
STEPS = 50  # largest number of steps of L-BFGS


@torch.no_grad()
def domains(
    model: Transformer, by_source: Mapping[str, Sequence[Batch]], group_of_modality: Tensor
) -> dict[str, float | list[float]]:
    """Returns the accuracy of the probe in each MoE layer, and the minimum over layers. Also returns the bits of the
    choices in each layer, and their mean over layers."""
    layers: list[list[tuple[Tensor, ...]]] = [[] for _ in model.moe_modules()]
    with recorded_inputs(model) as inputs, recorded_routers(model) as seen:
        for domain, batches in enumerate(by_source.values()):
            for batch in batches:
                inputs.clear()
                seen.clear()
                forward(model, batch, group_of_modality)
                for rows, h_TD, each in zip(layers, inputs, seen, strict=True):
                    rows.append(_rows(h_TD, each, batch, domain))
    accuracies, bits = [], []
    for rows in layers:
        h_ND, expert_N, domain_N, scored_N, even_N = (torch.cat(column) for column in zip(*rows, strict=True))
        accuracies.append(probe(h_ND[even_N], domain_N[even_N], h_ND[~even_N], domain_N[~even_N], len(by_source)))
        bits.append(mutual_information(expert_N[scored_N], domain_N[scored_N]))
    return {
        "least": min(accuracies),
        "by_layer": accuracies,
        "bits": sum(bits) / len(bits),
        "bits_by_layer": bits,
    }


@contextmanager
def recorded_inputs(model: Transformer) -> Iterator[list[Tensor]]:
    """Inside the context, each forward of a router appends its fp32 input [T, D] to the yielded list, layer by layer."""
    inputs: list[Tensor] = []

    def note(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        del module
        inputs.append(arguments[0].detach().float())

    with ExitStack() as stack:
        for layer in model.moe_modules():
            stack.enter_context(layer.router.register_forward_pre_hook(note))
        yield inputs


def _rows(h_TD: Tensor, seen: TokenPairs, batch: Batch, domain: int) -> tuple[Tensor, ...]:
    """Returns five values for each routed token that is not padding: the router's input, the chosen expert, the domain,
    whether the token's label is scored, and whether its sequence is the first, third, fifth, ... of the batch."""
    real_T = ~batch.padding_BS.flatten()[seen.index_T]
    place_T = seen.index_T[real_T]
    return (
        h_TD[real_T],
        first_choice(seen, len(h_TD))[real_T],
        torch.full_like(place_T, domain),
        (batch.labels_BS != IGNORED).flatten()[place_T],
        place_T // batch.tokens_BS.shape[1] % 2 == 0,
    )


def first_choice(seen: TokenPairs, num_tokens: int) -> Tensor:
    """Returns for each routed token the expert with the largest weight, [T]. Of experts with equal weights, the last one
    counts. A token without a true expert gets ABSENT."""
    pairs = seen.routing.assignments.taken()
    weight_N = pairs.weight_N.detach()
    largest_T = torch.zeros(num_tokens, dtype=weight_N.dtype).scatter_reduce_(0, pairs.token_N, weight_N, "amax")
    first_N = weight_N == largest_T[pairs.token_N]
    expert_T = torch.full((num_tokens,), ABSENT)
    return expert_T.scatter_reduce_(0, pairs.token_N[first_N], pairs.expert_N[first_N], "amax")


@torch.enable_grad()
def probe(x_ND: Tensor, domain_N: Tensor, other_ND: Tensor, other_domain_N: Tensor, num_domains: int) -> float:
    """Fits a softmax regression from `x_ND` to `domain_N`, and returns its accuracy on `other_ND`."""
    mean_D, scale_D = x_ND.mean(0), x_ND.std(0).clamp_min(1e-6)
    weight_CD = torch.zeros(num_domains, x_ND.shape[1], requires_grad=True)
    bias_C = torch.zeros(num_domains, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight_CD, bias_C], max_iter=STEPS, line_search_fn="strong_wolfe")
    scaled_ND = ((x_ND - mean_D) / scale_D).detach()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(nn.functional.linear(scaled_ND, weight_CD, bias_C), domain_N)
        loss = loss + PENALTY * weight_CD.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # pyright: ignore[reportArgumentType]  # its stub wants a float
    guessed_N = nn.functional.linear((other_ND - mean_D) / scale_D, weight_CD, bias_C).argmax(1)
    return float((guessed_N == other_domain_N).double().mean())


def mutual_information(expert_N: Tensor, domain_N: Tensor) -> float:
    """Returns the mutual information of expert and domain in bits, computed from the numbers of tokens."""
    column_N = expert_N - ABSENT  # 0 for tokens without an expert
    joint_EC = torch.zeros(int(column_N.max()) + 1, int(domain_N.max()) + 1, dtype=torch.float64)
    joint_EC.index_put_((column_N, domain_N), joint_EC.new_ones(len(column_N)), accumulate=True)
    joint_EC /= joint_EC.sum()
    apart_EC = joint_EC.sum(1, keepdim=True) * joint_EC.sum(0, keepdim=True)
    there_EC = joint_EC > 0
    return float((joint_EC[there_EC] * (joint_EC[there_EC] / apart_EC[there_EC]).log2()).sum())
