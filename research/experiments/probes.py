"""Changes the choices of a trained model's routers by hooks, to measure how the loss changes. Weights stay unchanged.

threshold    A token keeps its second expert only if the weight of this expert exceeds a bound. The probe is a simple way
             to use fewer experts in a top-2 model, and the baseline for adaptive routers.
flip         p % of each expert's tokens are replaced by as many tokens that the expert did not choose. This probe measures
             the cost of occasional wrong choices.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moe_dist.model.transformer import Transformer
from moe_dist.moe.routers.expert_choice import ExpertChoiceRouter
from moe_dist.moe.routing.types import ABSENT, Assignments, Routing

Change = Callable[[int, nn.Module, tuple[Any, ...], Any], Any]  # (index, module, arguments, result) -> changed result


@contextmanager
def changed_routing(modules: Sequence[nn.Module], change: Change) -> Iterator[None]:
    """Inside the context, `change` changes the result of each router in `modules`. It also gets the index of the router."""
    with ExitStack() as stack:
        for place, module in enumerate(modules):
            # The hook runs before all other hooks, so that `recorded_routers` records the changed routing.
            stack.enter_context(module.register_forward_hook(partial(change, place), prepend=True))
        yield


def routers(model: Transformer) -> list[nn.Module]:
    """Returns the routers in the order of their layers."""
    return [layer.router for layer in model.moe_modules()]


def second_weights(routing: Routing, num_tokens: int) -> Tensor:
    """Returns the weight of each token's second expert [T]; 0 for a token without a second expert.

    The router must be one in which tokens choose experts, and the two weights of a token must sum to 1.
    """
    weight_TK = torch.where(routing.assignments.expert_N != ABSENT, routing.assignments.weight_N.detach(), 0.0)
    return weight_TK.view(num_tokens, -1).sort(dim=1, descending=True).values[:, 1]


def threshold(bound: float) -> Change:
    """Drops second experts with a weight of at most `bound`. The first expert of such a token gets the weight 1."""

    def change(place: int, module: nn.Module, arguments: tuple[Any, ...], routing: Routing) -> Routing:
        del place, module
        num_tokens = arguments[0].shape[0]
        a = routing.assignments
        weight_TK, expert_TK = a.weight_N.view(num_tokens, -1), a.expert_N.view(num_tokens, -1)
        kept_TK = (expert_TK != ABSENT) & ((weight_TK > bound) | (weight_TK == weight_TK.amax(1, keepdim=True)))
        kept_weight_TK = torch.where(kept_TK, weight_TK, 0.0)
        kept_weight_TK = kept_weight_TK / kept_weight_TK.sum(1, keepdim=True).clamp_min(1e-9)
        pairs = Assignments(a.token_N, torch.where(kept_TK, expert_TK, ABSENT).flatten(), kept_weight_TK.flatten())
        return routing._replace(assignments=pairs)

    return change


def bound_for_load(second_N: Tensor, load: float) -> float:
    """Returns a bound on the weight of second experts. With this bound, tokens keep `load` experts on average (from 1 to
    2). `second_N` has the weight of each token's second expert."""
    if not 1.0 <= load <= 2.0:
        raise ValueError(f"a threshold on the second expert gives loads of 1 to 2, not {load:g}")
    dropped = round((2.0 - load) * len(second_N))
    return float(second_N.sort().values[dropped - 1]) if dropped else -1.0


def flip(percent: float, *, seed: int) -> Change:
    """Replaces `percent` % of each expert's tokens by random tokens of the expert's group that the expert did not choose.

    A newly chosen token gets the weight that the router would give this token: its score for the expert.
    """

    def change(place: int, module: nn.Module, arguments: tuple[Any, ...], routing: Routing) -> Routing:
        taken_TE, weight_TE, inside_TE = _table(module, arguments[0], arguments[1], routing)
        generator = _generator(seed, place, taken_TE)
        flipped = [
            swapped(taken_T, may_T, percent, generator) for taken_T, may_T in zip(taken_TE.T, inside_TE.T, strict=True)
        ]
        token_N, expert_N = torch.stack(flipped, dim=1).nonzero(as_tuple=True)
        return routing._replace(assignments=Assignments(token_N, expert_N, weight_TE[token_N, expert_N]))

    return change


def flip_depths(percent: float, *, seed: int) -> Change:
    """Replaces `percent` % of the tokens that a mixture-of-depths layer computes by random tokens that the layer skips."""

    def change(place: int, module: nn.Module, arguments: tuple[Any, ...], chosen: Any) -> Any:
        x_TD, real_T = arguments
        taken_T = torch.zeros_like(real_T)
        taken_T[chosen.index_C[chosen.full_C]] = True
        flipped_T = swapped(taken_T, real_T, percent, _generator(seed, place, taken_T))
        index_C = flipped_T.nonzero().flatten()
        if not len(index_C):
            return chosen
        weight_T = module.takes(x_TD)[1]  # pyright: ignore[reportCallIssue]
        return chosen._replace(
            index_C=index_C, full_C=torch.ones_like(index_C, dtype=torch.bool), weight_C=weight_T[index_C]
        )

    return change


def swapped(taken_T: Tensor, may_T: Tensor, percent: float, generator: torch.Generator) -> Tensor:
    """Returns `taken_T` after about `percent` % of its tokens are replaced by as many other tokens of `may_T`."""
    inside, outside = taken_T.nonzero().flatten(), (may_T & ~taken_T).nonzero().flatten()
    # The number of replaced tokens is a binomial draw, because `percent` % of few tokens would be rounded to 0.
    drawn = torch.binomial(torch.tensor(float(len(inside))), torch.tensor(percent / 100), generator=generator)
    count = min(int(drawn), len(inside), len(outside))
    result_T = taken_T.clone()
    result_T[inside[torch.randperm(len(inside), generator=generator)[:count]]] = False
    result_T[outside[torch.randperm(len(outside), generator=generator)[:count]]] = True
    return result_T


def _generator(seed: int, place: int, taken: Tensor) -> torch.Generator:
    """Makes the random generator for a layer and a batch. The seed of the generator depends on the choices, but not on the
    percentage."""
    return torch.Generator().manual_seed(hash((seed, place, *taken.shape, int(taken.sum()))) & 0x7FFFFFFF)


def _table(module: nn.Module, h_TD: Tensor, group_T: Tensor, routing: Routing) -> tuple[Tensor, Tensor, Tensor]:
    """Returns three tensors over all (token, expert) pairs [T, E]. The first tells whether the pair was chosen. The second
    has the weight of the pair, or the weight that it would have if it were chosen. The third tells whether token and expert
    are in the same expert group. Takes O(T x E) memory."""
    assert isinstance(module, ExpertChoiceRouter), "routers whose tokens choose have other weights"
    logits_TE = module._logits(h_TD.float())  # their sigmoids are the scores
    groups = [i for i, group in enumerate(module.groups) for _ in group.experts]  # pyright: ignore
    inside_TE = group_T[:, None] == torch.tensor(groups)
    taken_TE = torch.zeros_like(inside_TE)
    pairs = routing.assignments.taken()
    taken_TE[pairs.token_N, pairs.expert_N] = True
    return taken_TE, logits_TE.sigmoid(), inside_TE
