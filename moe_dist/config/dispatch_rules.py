"""What a dispatcher demands of the rest of a configuration. Imports no torch."""

from moe_dist.config.model_schema import FixedLoadRouterSection, TopKRouterSection
from moe_dist.config.parallel_schema import (
    DeepEPDispatchSection,
    HybridEPDispatchSection,
    PerNodeDispatchSection,
    PerPairDispatchSection,
)
from moe_dist.config.schema import Config
from moe_dist.config.section import Relation

SIZES = (2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 144, 160)  # ranks for which DeepEP has settings of its kernels


def ranks_per_node(config: Config) -> int | None:
    """Ranks of a node where the dispatcher cuts EP groups into nodes, else None."""
    section = config.parallel.dispatch
    return section.ranks_per_node if isinstance(section, PerNodeDispatchSection) else None


def dispatch_relations(config: Config) -> list[Relation]:
    """Rules of `parallel.dispatch` that do not hold."""
    section = config.parallel.dispatch
    if isinstance(section, DeepEPDispatchSection | HybridEPDispatchSection) and config.model.depths is not None:
        fault = (
            f"parallel.dispatch.kind={section.kind}: its buffers are made for one number of tokens, and with model.depths "
            "layers differ in it; take parallel.dispatch.kind=per_rank, or set model.depths to null"
        )
        return [Relation(("parallel.dispatch.kind", "model.depths"), fault)]
    if isinstance(section, PerNodeDispatchSection):
        return _node_relations(section, config.parallel.ep)
    if isinstance(section, PerPairDispatchSection):
        return _pair_relations(config)
    if isinstance(section, DeepEPDispatchSection):
        return [*_deep_ep_relations(config), *_kernel_relations(config, "DeepEP"), *_choice_relations(config)]
    if isinstance(section, HybridEPDispatchSection):
        return [*_hybrid_ep_relations(config), *_kernel_relations(config, "HybridEP")]
    return []


def _node_relations(section: PerNodeDispatchSection, ep: int) -> list[Relation]:
    if ep % section.ranks_per_node == 0:
        return []
    near = [str(ranks) for ranks in range(1, ep + 1) if ep % ranks == 0]
    fault = (
        f"parallel.dispatch.ranks_per_node={section.ranks_per_node}: an EP group of parallel.ep={ep} ranks cannot be cut "
        f"into nodes of so many; take {_either(near)}, or another parallel.ep"
    )
    return [Relation(("parallel.dispatch.ranks_per_node", "parallel.ep"), fault)]


def _pair_relations(config: Config) -> list[Relation]:
    router = config.model.moe.router
    name = "parallel.dispatch.kind=per_pair: needs the number of pairs of each rank and expert beforehand, and with"
    way_out = "take parallel.dispatch.kind=per_rank"
    if isinstance(router, TopKRouterSection | FixedLoadRouterSection):
        fault = f"{name} model.moe.router.kind={router.kind} the tokens choose, so that it is not known; {way_out}"
        return [Relation(("parallel.dispatch.kind", "model.moe.router.kind"), fault)]
    if router.set != "rank":
        fault = (
            f"{name} model.moe.router.set={router.set} it depends on the other ranks' scores; {way_out}, or "
            "model.moe.router.set=rank"
        )
        return [Relation(("parallel.dispatch.kind", "model.moe.router.set"), fault)]
    return []


def _deep_ep_relations(config: Config) -> list[Relation]:
    ep = config.parallel.ep
    if ep in SIZES:
        return []
    sizes = _either([str(size) for size in SIZES])
    fault = (
        f"parallel.dispatch.kind=deep_ep: DeepEP has no settings for parallel.ep={ep} ranks; take {sizes}, or take "
        "parallel.dispatch.kind=per_rank"
    )
    return [Relation(("parallel.dispatch.kind", "parallel.ep"), fault)]


def _choice_relations(config: Config) -> list[Relation]:
    """DeepEP takes as many choices of every token; an expert's choice leaves some tokens with more than others."""
    kind = config.model.moe.router.kind
    fault = (
        f"parallel.dispatch.kind=deep_ep: takes top_k choices of each token, and with model.moe.router.kind={kind} a token "
        "may be taken by any number of experts; take parallel.dispatch.kind=per_rank"
    )
    return [Relation(("parallel.dispatch.kind", "model.moe.router.kind"), fault)] if kind == "expert_choice" else []


def _hybrid_ep_relations(config: Config) -> list[Relation]:
    """Sizes that HybridEP copies by TMA, in wholes of 16 bytes; and a group, since there is no identity wire here."""
    ep, tokens, width = config.parallel.ep, config.train.micro_batch * config.data.seq_len, config.model.hidden_dim
    name, way_out = "parallel.dispatch.kind=hybrid_ep", "or take parallel.dispatch.kind=per_rank"
    broken = []
    if ep == 1:
        fault = f"{name}: there is no other rank with parallel.ep=1; raise it, {way_out}"
        broken.append(Relation(("parallel.dispatch.kind", "parallel.ep"), fault))
    if tokens % 4:
        fault = (
            f"{name}: a rank's tokens must be a multiple of 4, but train.micro_batch={config.train.micro_batch} times "
            f"data.seq_len={config.data.seq_len} is {tokens}; change either, {way_out}"
        )
        broken.append(Relation(("parallel.dispatch.kind", "train.micro_batch", "data.seq_len"), fault))
    if width % 16:
        fault = f"{name}: rows must be a multiple of 16 wide, but model.hidden_dim={width}; change it, {way_out}"
        broken.append(Relation(("parallel.dispatch.kind", "model.hidden_dim"), fault))
    return broken


def _kernel_relations(config: Config, kernels: str) -> list[Relation]:
    """What every dispatcher by somebody else's kernels demands."""
    parallel, way_out = config.parallel, "or take parallel.dispatch.kind=per_rank"
    name = f"parallel.dispatch.kind={parallel.dispatch.kind}"
    broken = []
    if parallel.precision != "bf16":
        fault = f"{name}: rows travel in bf16, but parallel.precision={parallel.precision}; set it to bf16, {way_out}"
        broken.append(Relation(("parallel.dispatch.kind", "parallel.precision"), fault))
    if parallel.device == "cpu":
        fault = f"{name}: its kernels need GPUs, but parallel.device=cpu; set it to cuda, {way_out}"
        broken.append(Relation(("parallel.dispatch.kind", "parallel.device"), fault))
    if parallel.check_exchanges:
        fault = f"{name}: parallel.check_exchanges cannot look into {kernels}'s exchanges; set it to false, {way_out}"
        broken.append(Relation(("parallel.dispatch.kind", "parallel.check_exchanges"), fault))
    if parallel.max_receive_rows is not None:
        fault = (
            f"{name}: {kernels} makes the receive buffer itself, so that "
            f"parallel.max_receive_rows={parallel.max_receive_rows} cannot be kept; set it to null, {way_out}"
        )
        broken.append(Relation(("parallel.dispatch.kind", "parallel.max_receive_rows"), fault))
    return broken


def _either(values: list[str]) -> str:
    *most, last = values
    return f"{', '.join(most)} or {last}" if most else last
