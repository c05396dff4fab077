"""What a dispatcher demands of the rest of a configuration. Imports no torch."""

from moe_dist.config.schema import Config, DeepEPDispatchSection, PerNodeDispatchSection, PerPairDispatchSection, Relation

SIZES = (2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 144, 160)  # ranks for which DeepEP has settings of its kernels


def ranks_per_node(config: Config) -> int | None:
    """Ranks of a node where the dispatcher cuts EP groups into nodes, else None."""
    section = config.parallel.dispatch
    return section.ranks_per_node if isinstance(section, PerNodeDispatchSection) else None


def dispatch_relations(config: Config) -> list[Relation]:
    """Rules of `parallel.dispatch` that do not hold."""
    section = config.parallel.dispatch
    if isinstance(section, PerNodeDispatchSection):
        return _node_relations(section, config.parallel.ep)
    if isinstance(section, PerPairDispatchSection):
        return _pair_relations(config)
    if isinstance(section, DeepEPDispatchSection):
        return _deep_ep_relations(config)
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
    kind = config.model.moe.router.kind
    fault = (
        f"parallel.dispatch.kind=per_pair: needs the number of pairs of each rank and expert beforehand, and with "
        f"model.moe.router.kind={kind} the tokens choose, so that it is not known; take parallel.dispatch.kind=per_rank"
    )
    return [Relation(("parallel.dispatch.kind", "model.moe.router.kind"), fault)] if kind == "top_k" else []


def _deep_ep_relations(config: Config) -> list[Relation]:
    parallel, name, way_out = config.parallel, "parallel.dispatch.kind=deep_ep", "or take parallel.dispatch.kind=per_rank"
    broken = []
    if parallel.ep not in SIZES:
        sizes = _either([str(size) for size in SIZES])
        fault = f"{name}: DeepEP has no settings for parallel.ep={parallel.ep} ranks; take {sizes}, {way_out}"
        broken.append(Relation(("parallel.dispatch.kind", "parallel.ep"), fault))
    if parallel.precision != "bf16":
        fault = f"{name}: rows travel in bf16, but parallel.precision={parallel.precision}; set it to bf16, {way_out}"
        broken.append(Relation(("parallel.dispatch.kind", "parallel.precision"), fault))
    if parallel.device == "cpu":
        fault = f"{name}: its kernels need GPUs, but parallel.device=cpu; set it to cuda, {way_out}"
        broken.append(Relation(("parallel.dispatch.kind", "parallel.device"), fault))
    if parallel.check_exchanges:
        fault = f"{name}: parallel.check_exchanges cannot look into DeepEP's exchanges; set it to false, {way_out}"
        broken.append(Relation(("parallel.dispatch.kind", "parallel.check_exchanges"), fault))
    if parallel.max_receive_rows is not None:
        fault = (
            f"{name}: DeepEP makes the receive buffer itself, so that "
            f"parallel.max_receive_rows={parallel.max_receive_rows} cannot be kept; set it to null, {way_out}"
        )
        broken.append(Relation(("parallel.dispatch.kind", "parallel.max_receive_rows"), fault))
    return broken


def _either(values: list[str]) -> str:
    *most, last = values
    return f"{', '.join(most)} or {last}" if most else last
