"""What a dispatcher demands of the rest of a configuration. Imports no torch."""

from moe_dist.config.model_schema import ScheduledTopKRouterSection, TopKRouterSection
from moe_dist.config.parallel_schema import (
    DeepEPDispatchSection,
    HierarchicalDispatchSection,
    HybridEPDispatchSection,
    KnownCountsDispatchSection,
)
from moe_dist.config.schema import Config
from moe_dist.config.section import Violation

SIZES = (2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 144, 160)  # ranks for which DeepEP has settings of its kernels


def ranks_per_node(config: Config) -> int | None:
    """Ranks of a node where the dispatcher cuts EP groups into nodes, else None."""
    section = config.parallel.dispatch
    return section.ranks_per_node if isinstance(section, HierarchicalDispatchSection) else None


def dispatch_violations(config: Config) -> list[Violation]:
    """Rules of `parallel.dispatch` that do not hold."""
    section = config.parallel.dispatch
    if isinstance(section, DeepEPDispatchSection | HybridEPDispatchSection) and config.model.mixture_of_depths is not None:
        problem = (
            f"parallel.dispatch.kind={section.kind}: its buffers are made for one number of tokens, and with model.mixture_of_depths "
            "layers differ in it; take parallel.dispatch.kind=all_to_all, or set model.mixture_of_depths to null"
        )
        return [Violation(("parallel.dispatch.kind", "model.mixture_of_depths"), problem)]
    if isinstance(section, HierarchicalDispatchSection):
        return _node_violations(section, config.parallel.ep)
    if isinstance(section, KnownCountsDispatchSection):
        return _pair_violations(config)
    if isinstance(section, DeepEPDispatchSection):
        return [*_deep_ep_violations(config), *_kernel_violations(config, "DeepEP"), *_choice_violations(config)]
    if isinstance(section, HybridEPDispatchSection):
        return [*_hybrid_ep_violations(config), *_kernel_violations(config, "HybridEP")]
    return []


def _node_violations(section: HierarchicalDispatchSection, ep: int) -> list[Violation]:
    if ep % section.ranks_per_node == 0:
        return []
    near = [str(ranks) for ranks in range(1, ep + 1) if ep % ranks == 0]
    problem = (
        f"parallel.dispatch.ranks_per_node={section.ranks_per_node}: an EP group of parallel.ep={ep} ranks cannot be cut "
        f"into nodes of so many; take {_either(near)}, or another parallel.ep"
    )
    return [Violation(("parallel.dispatch.ranks_per_node", "parallel.ep"), problem)]


def _pair_violations(config: Config) -> list[Violation]:
    router = config.model.moe.router
    name = "parallel.dispatch.kind=known_counts: needs the number of pairs of each rank and expert beforehand, and with"
    fix = "take parallel.dispatch.kind=all_to_all"
    if isinstance(router, TopKRouterSection | ScheduledTopKRouterSection):
        problem = f"{name} model.moe.router.kind={router.kind} the tokens choose, so that it is not known; {fix}"
        return [Violation(("parallel.dispatch.kind", "model.moe.router.kind"), problem)]
    if router.scope != "rank":
        problem = (
            f"{name} model.moe.router.scope={router.scope} it depends on the other ranks' scores; {fix}, or "
            "model.moe.router.scope=rank"
        )
        return [Violation(("parallel.dispatch.kind", "model.moe.router.scope"), problem)]
    return []


def _deep_ep_violations(config: Config) -> list[Violation]:
    ep = config.parallel.ep
    if ep in SIZES:
        return []
    sizes = _either([str(size) for size in SIZES])
    problem = (
        f"parallel.dispatch.kind=deep_ep: DeepEP has no settings for parallel.ep={ep} ranks; take {sizes}, or take "
        "parallel.dispatch.kind=all_to_all"
    )
    return [Violation(("parallel.dispatch.kind", "parallel.ep"), problem)]


def _choice_violations(config: Config) -> list[Violation]:
    """DeepEP takes as many choices of every token; an expert's choice leaves some tokens with more than others."""
    kind = config.model.moe.router.kind
    problem = (
        f"parallel.dispatch.kind=deep_ep: takes top_k choices of each token, and with model.moe.router.kind={kind} a token "
        "may be taken by any number of experts; take parallel.dispatch.kind=all_to_all"
    )
    return [Violation(("parallel.dispatch.kind", "model.moe.router.kind"), problem)] if kind == "expert_choice" else []


def _hybrid_ep_violations(config: Config) -> list[Violation]:
    """Sizes that HybridEP copies by TMA, in wholes of 16 bytes; and a group, since there is no identity wire here."""
    ep, tokens, width = config.parallel.ep, config.train.micro_batch * config.data.seq_len, config.model.hidden_dim
    name, fix = "parallel.dispatch.kind=hybrid_ep", "or take parallel.dispatch.kind=all_to_all"
    broken = []
    if ep == 1:
        problem = f"{name}: there is no other rank with parallel.ep=1; raise it, {fix}"
        broken.append(Violation(("parallel.dispatch.kind", "parallel.ep"), problem))
    if tokens % 4:
        problem = (
            f"{name}: a rank's tokens must be a multiple of 4, but train.micro_batch={config.train.micro_batch} times "
            f"data.seq_len={config.data.seq_len} is {tokens}; change either, {fix}"
        )
        broken.append(Violation(("parallel.dispatch.kind", "train.micro_batch", "data.seq_len"), problem))
    if width % 16:
        problem = f"{name}: rows must be a multiple of 16 wide, but model.hidden_dim={width}; change it, {fix}"
        broken.append(Violation(("parallel.dispatch.kind", "model.hidden_dim"), problem))
    return broken


def _kernel_violations(config: Config, kernels: str) -> list[Violation]:
    """What every dispatcher by somebody else's kernels demands."""
    parallel, fix = config.parallel, "or take parallel.dispatch.kind=all_to_all"
    name = f"parallel.dispatch.kind={parallel.dispatch.kind}"
    broken = []
    if parallel.precision != "bf16":
        problem = f"{name}: rows travel in bf16, but parallel.precision={parallel.precision}; set it to bf16, {fix}"
        broken.append(Violation(("parallel.dispatch.kind", "parallel.precision"), problem))
    if parallel.device == "cpu":
        problem = f"{name}: its kernels need GPUs, but parallel.device=cpu; set it to cuda, {fix}"
        broken.append(Violation(("parallel.dispatch.kind", "parallel.device"), problem))
    if parallel.check_exchanges:
        problem = f"{name}: parallel.check_exchanges cannot look into {kernels}'s exchanges; set it to false, {fix}"
        broken.append(Violation(("parallel.dispatch.kind", "parallel.check_exchanges"), problem))
    if parallel.max_receive_rows is not None:
        problem = (
            f"{name}: {kernels} makes the receive buffer itself, so that "
            f"parallel.max_receive_rows={parallel.max_receive_rows} cannot be kept; set it to null, {fix}"
        )
        broken.append(Violation(("parallel.dispatch.kind", "parallel.max_receive_rows"), problem))
    return broken


def _either(values: list[str]) -> str:
    *most, last = values
    return f"{', '.join(most)} or {last}" if most else last
