"""What a router demands of the rest of a configuration. Imports no torch."""

from moe_dist.config.model_schema import ExpertChoiceRouterSection, FixedLoadRouterSection, GroupSection
from moe_dist.config.schema import Config
from moe_dist.config.section import Relation

ROUTER = "model.moe.router"


def router_relations(config: Config) -> list[Relation]:
    """Rules of `model.moe.router` and `train.only` that do not hold."""
    section = config.model.moe.router
    if isinstance(section, ExpertChoiceRouterSection):
        return [
            *_loss_relations(config),
            *_group_relations(config, section),
            *_causal_relations(config, section),
            *_depth_relations(config, section),
            *_stage_relations(config),
        ]
    broken = _load_relations(config, section) if isinstance(section, FixedLoadRouterSection) else []
    if config.train.only != "auxiliary_routers":
        return broken
    fault = (
        f"train.only={config.train.only}: model.moe.router.kind={section.kind} has no auxiliary routers; set train.only to "
        "null, or model.moe.router.kind=expert_choice"
    )
    return [*broken, Relation(("train.only", f"{ROUTER}.kind"), fault)]


def _load_relations(config: Config, section: FixedLoadRouterSection) -> list[Relation]:
    """Each group has a load for each layer, of true experts that it has."""
    layers, groups, key = len(config.model.moe_layers), config.model.moe.groups, f"{ROUTER}.loads"
    broken = []
    if set(section.loads) != set(groups):
        fault = f"{key} names {', '.join(section.loads)}; model.moe.groups are {', '.join(groups)}: name each of them"
        broken.append(Relation((key, "model.moe.groups"), fault))
    for name, loads in section.loads.items():
        if len(loads) != layers:
            fault = f"{key}.{name} has {len(loads)} numbers for {layers} MoE layers: give one for each"
            broken.append(Relation((f"{key}.{name}", "model.num_layers"), fault))
        if name in groups and max(loads, default=0.0) > groups[name].top_k:
            top_k = groups[name].top_k
            fault = (
                f"{key}.{name} has {max(loads):g}, above model.moe.groups.{name}.top_k={top_k}: lower it, or raise top_k"
            )
            broken.append(Relation((f"{key}.{name}", f"model.moe.groups.{name}.top_k"), fault))
        if name in groups and _has_others(groups[name]):
            fault = (
                f"model.moe.groups.{name} has null or free experts: {ROUTER}.kind=fixed_load takes true ones alone; set "
                f"num_null, num_identity and num_constant to 0, or {ROUTER}.kind=top_k"
            )
            broken.append(Relation((f"model.moe.groups.{name}", f"{ROUTER}.kind"), fault))
        # A draw is of a step and a token; a layer of depths computes slots, and does not know which tokens these are.
        drawn = [each for each, load in zip(config.model.moe_layers, loads, strict=False) if load % 1.0]
        if deep := sorted(set(drawn) & set(config.model.depth_layers)):
            fault = (
                f"{key}.{name}={list(loads)} with model.depths: draws cannot be told by token in the layers {deep}, which "
                "compute some of them; give whole numbers there, or set model.depths to null"
            )
            broken.append(Relation((f"{key}.{name}", "model.depths"), fault))
    return broken


def _has_others(group: GroupSection) -> bool:
    return bool(group.num_null or group.num_identity or group.num_constant)


def _loss_relations(config: Config) -> list[Relation]:
    """Losses of token choice: an expert that chooses is balanced already, and its scores are no softmax."""
    name, broken = f"{ROUTER}.kind=expert_choice", []
    schedule = config.loss.balance.schedule
    if any(coefficient for _, coefficient in schedule):
        fault = (
            f"loss.balance.schedule={[list(pair) for pair in schedule]}: {name} with token-choice losses; each expert "
            "takes its share of the tokens by itself: set loss.balance.schedule=[[0, 0]]"
        )
        broken.append(Relation(("loss.balance.schedule", f"{ROUTER}.kind"), fault))
    if config.loss.z:
        fault = (
            f"loss.z={config.loss.z:g}: {name} with token-choice losses; the z-loss is of a softmax's logits, and the "
            "scores are sigmoids: set loss.z=0"
        )
        broken.append(Relation(("loss.z", f"{ROUTER}.kind"), fault))
    return broken


def _group_relations(config: Config, section: ExpertChoiceRouterSection) -> list[Relation]:
    """Nothing but true experts chooses, and none takes more than all tokens."""
    name, broken = f"{ROUTER}.kind=expert_choice", []
    for group_name, group in config.model.moe.groups.items():
        prefix = f"model.moe.groups.{group_name}"
        for key in ("num_null", "num_identity", "num_constant"):
            if count := getattr(group, key):
                fault = (
                    f"{prefix}.{key}={count}: with {name} true experts alone choose, and a token may be left to none; set "
                    f"it to 0, or {ROUTER}.kind=top_k"
                )
                broken.append(Relation((f"{prefix}.{key}", f"{ROUTER}.kind"), fault))
        if section.capacity is None and group.top_k > group.num_experts:
            fault = (
                f"{prefix}.top_k={group.top_k}: with {name} each of {group.num_experts} experts would take more than all "
                f"tokens; lower it to at most {group.num_experts}"
            )
            broken.append(Relation((f"{prefix}.top_k", f"{prefix}.num_experts", f"{ROUTER}.kind"), fault))
    if config.model.moe.capacity is not None:
        fault = (
            f"model.moe.capacity: with {name} each expert takes its capacity and nothing is dropped; set "
            f"model.moe.capacity to null, and {ROUTER}.capacity to the share that an expert takes"
        )
        broken.append(Relation(("model.moe.capacity", f"{ROUTER}.kind"), fault))
    return broken


def _causal_relations(config: Config, section: ExpertChoiceRouterSection) -> list[Relation]:
    keys = (f"{ROUTER}.causal", "train.only")
    if section.causal is None:
        fault = (
            f"{ROUTER}.causal=null: held-out evaluation would choose among tokens by later ones, which no use of the model "
            f"knows; set {ROUTER}.causal=threshold, or auxiliary in a second stage"
        )
        return [Relation(keys[:1], fault)]
    if section.causal == "auxiliary" and config.train.only is None:
        fault = (
            f"{ROUTER}.causal=auxiliary: auxiliary routers are trained in a second stage, and train.only=null trains the "
            f"rest; train first with {ROUTER}.causal=threshold, then start a run with train.only=auxiliary_routers and "
            "run.init_from naming the first"
        )
        return [Relation(keys, fault)]
    if section.causal == "threshold" and config.train.only == "auxiliary_routers":
        fault = (
            f"train.only={config.train.only}: {ROUTER}.causal=threshold has no auxiliary routers; set "
            f"{ROUTER}.causal=auxiliary"
        )
        return [Relation(keys, fault)]
    return []


def _depth_relations(config: Config, section: ExpertChoiceRouterSection) -> list[Relation]:
    """What is known of a micro-batch beforehand is not known of the tokens that a layer of model.depths takes of it."""
    if config.model.depths is None or (section.set == "rank" and not section.noise):
        return []
    said = f"set={section.set}" if section.set != "rank" else f"noise={section.noise:g}"
    fault = (
        f"{ROUTER}.{said} with model.depths: which tokens reach the experts of such a layer is known "
        f"in it alone; set {ROUTER}.set=rank and {ROUTER}.noise=0, or model.depths to null"
    )
    return [Relation((f"{ROUTER}.set", f"{ROUTER}.noise", "model.depths"), fault)]


def _stage_relations(config: Config) -> list[Relation]:
    broken = []
    if config.train.only != "auxiliary_routers":
        return broken
    if config.run.init_from is None:
        fault = (
            f"train.only={config.train.only}: freezes the model, and run.init_from=null leaves it untrained; set "
            "run.init_from to the run of the first stage"
        )
        broken.append(Relation(("train.only", "run.init_from"), fault))
    section = config.model.moe.router
    if isinstance(section, ExpertChoiceRouterSection) and section.noise:
        fault = (
            f"{ROUTER}.noise={section.noise:g}: the auxiliary routers of train.only={config.train.only} would learn "
            f"choices that the noise made; set {ROUTER}.noise=0"
        )
        broken.append(Relation(("train.only", f"{ROUTER}.noise"), fault))
    return broken
