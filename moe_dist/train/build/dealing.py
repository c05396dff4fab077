"""Makes the `Dealing` from the configuration. A `Dealing` deals a step's sequences to ranks by their expected costs."""

from collections.abc import Sequence

import numpy as np

from moe_dist.config.schema import Config
from moe_dist.data.dealing import Dealing, SequenceCosts
from moe_dist.plan.flops import forward_flops
from moe_dist.plan.policies import expert_groups


def build_dealing(config: Config, modalities: Sequence[str]) -> Dealing | None:
    """Makes the `Dealing`; None without `rank_balance.dealing`. `modalities` lists the manifest's modality names."""
    if not config.rank_balance.dealing:
        return None
    balance = config.loss.balance
    terms = balance.scope == "micro_batch" and (any(each for _, each in balance.schedule) or config.loss.z > 0.0)
    return Dealing(sequence_costs(config, modalities), ep=config.parallel.ep, mix=not terms)


def sequence_costs(config: Config, modalities: Sequence[str]) -> SequenceCosts:
    """Returns the costs of this run's sequences.

    If a load controller or a weight of null experts sets the number of true experts per token, this number is used;
    otherwise the number that is expected under uniform routing is used.
    """
    model, groups = config.model, expert_groups(config.model.moe)
    taken = {each.name: config.even_active.get(each.name, each.expected_experts_per_token) for each in groups}
    none = dict.fromkeys(taken, 0.0)

    def flops(share: dict[str, float]) -> float:
        return forward_flops(model, seq_len=1, experts_per_token=taken, token_share=share).total

    with_experts = {name: flops({**none, each.name: 1.0}) for each in groups for name in each.modalities}
    length_S = np.arange(config.data.seq_len + 1, dtype=np.float64)
    keys_S = np.sum([np.minimum(length_S, window or np.inf) for window in model.windows], axis=0)
    each_key = 2 * model.attention.score_width(model)
    token = flops(none) - each_key * model.num_layers  # seq_len=1 counts the attention to one key
    return SequenceCosts(
        length_S * (token + each_key * keys_S),
        np.array([with_experts[name] - flops(none) for name in modalities]),
        *_encoder_costs(config),
    )


def _encoder_costs(config: Config) -> tuple[float, float]:
    """Returns the FLOPs of a patch in a family's encoder, and of a patch's attention to another. Convolutions and the
    projector are left out: they take a few percent."""
    if not config.engine.hosts or config.model.family is None:
        return 0.0, 0.0
    from moe_dist.hf.host.family import family_config, reads_pictures  # needs transformers

    found = family_config(config.model.family, config.model.fields)
    if not reads_pictures(found):
        return 0.0, 0.0
    vision = found.vision_config
    layers, width = getattr(vision, "depth", None) or vision.num_hidden_layers, vision.hidden_size
    inner = getattr(vision, "intermediate_size", 4 * width)
    return layers * 4.0 * width * (2 * width + inner), layers * 4.0 * width
