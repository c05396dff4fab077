"""What a router demands of the rest of a configuration. Imports no torch."""

from moe_dist.config.model_schema import ExpertChoiceRouterSection, GroupSection, ScheduledTopKRouterSection
from moe_dist.config.schema import Config
from moe_dist.config.section import Violation

ROUTER = "model.moe.router"


def router_violations(config: Config) -> list[Violation]:
    """Rules of `model.moe.router` and `train.only` that do not hold."""
    section = config.model.moe.router
    if isinstance(section, ExpertChoiceRouterSection):
        return [
            *_loss_violations(config),
            *_group_violations(config, section),
            *_causal_violations(config, section),
            *_depth_violations(config, section),
            *_stage_violations(config),
        ]
    broken = _load_violations(config, section) if isinstance(section, ScheduledTopKRouterSection) else []
    if config.train.only != "auxiliary_routers":
        return broken
    problem = (
        f"train.only={config.train.only}: model.moe.router.kind={section.kind} has no auxiliary routers; set train.only to "
        "null, or model.moe.router.kind=expert_choice"
    )
    return [*broken, Violation(("train.only", f"{ROUTER}.kind"), problem)]


def _load_violations(config: Config, section: ScheduledTopKRouterSection) -> list[Violation]:
    """Each group has a load for each layer, of true experts that it has."""
    layers, groups, key = len(config.model.moe_layers), config.model.moe.groups, f"{ROUTER}.active_experts"
    broken = []
    if set(section.active_experts) != set(groups):
        problem = (
            f"{key} names {', '.join(section.active_experts)}; model.moe.groups are {', '.join(groups)}: name each of them"
        )
        broken.append(Violation((key, "model.moe.groups"), problem))
    for name, loads in section.active_experts.items():
        if len(loads) != layers:
            problem = f"{key}.{name} has {len(loads)} numbers for {layers} MoE layers: give one for each"
            broken.append(Violation((f"{key}.{name}", "model.num_layers"), problem))
        if name in groups and max(loads, default=0.0) > groups[name].top_k:
            top_k = groups[name].top_k
            problem = (
                f"{key}.{name} has {max(loads):g}, above model.moe.groups.{name}.top_k={top_k}: lower it, or raise top_k"
            )
            broken.append(Violation((f"{key}.{name}", f"model.moe.groups.{name}.top_k"), problem))
        if name in groups and _has_others(groups[name]):
            problem = (
                f"model.moe.groups.{name} has null or zero-computation experts: {ROUTER}.kind=scheduled_top_k takes true ones alone; set "
                f"num_null, num_identity and num_constant to 0, or {ROUTER}.kind=top_k"
            )
            broken.append(Violation((f"model.moe.groups.{name}", f"{ROUTER}.kind"), problem))
        # A draw is of a step and a token; a layer of depths computes slots, and does not know which tokens these are.
        drawn = [each for each, load in zip(config.model.moe_layers, loads, strict=False) if load % 1.0]
        if deep := sorted(set(drawn) & set(config.model.depth_layers)):
            problem = (
                f"{key}.{name}={list(loads)} with model.mixture_of_depths: draws cannot be told by token in the layers {deep}, which "
                "compute some of them; give whole numbers there, or set model.mixture_of_depths to null"
            )
            broken.append(Violation((f"{key}.{name}", "model.mixture_of_depths"), problem))
    return broken


def _has_others(group: GroupSection) -> bool:
    return bool(group.num_null or group.num_identity or group.num_constant)


def _loss_violations(config: Config) -> list[Violation]:
    """Losses of token choice: an expert that chooses is balanced already, and its scores are no softmax."""
    name, broken = f"{ROUTER}.kind=expert_choice", []
    schedule = config.loss.balance.schedule
    if any(coefficient for _, coefficient in schedule):
        problem = (
            f"loss.balance.schedule={[list(pair) for pair in schedule]}: {name} with token-choice losses; each expert "
            "takes its share of the tokens by itself: set loss.balance.schedule=[[0, 0]]"
        )
        broken.append(Violation(("loss.balance.schedule", f"{ROUTER}.kind"), problem))
    if config.loss.z:
        problem = (
            f"loss.z={config.loss.z:g}: {name} with token-choice losses; the z-loss is of a softmax's logits, and the "
            "scores are sigmoids: set loss.z=0"
        )
        broken.append(Violation(("loss.z", f"{ROUTER}.kind"), problem))
    return broken


def _group_violations(config: Config, section: ExpertChoiceRouterSection) -> list[Violation]:
    """Nothing but true experts chooses, and none takes more than all tokens."""
    name, broken = f"{ROUTER}.kind=expert_choice", []
    for group_name, group in config.model.moe.groups.items():
        prefix = f"model.moe.groups.{group_name}"
        for key in ("num_null", "num_identity", "num_constant"):
            if count := getattr(group, key):
                problem = (
                    f"{prefix}.{key}={count}: with {name} true experts alone choose, and a token may be left to none; set "
                    f"it to 0, or {ROUTER}.kind=top_k"
                )
                broken.append(Violation((f"{prefix}.{key}", f"{ROUTER}.kind"), problem))
        if section.capacity is None and group.top_k > group.num_experts:
            problem = (
                f"{prefix}.top_k={group.top_k}: with {name} each of {group.num_experts} experts would take more than all "
                f"tokens; lower it to at most {group.num_experts}"
            )
            broken.append(Violation((f"{prefix}.top_k", f"{prefix}.num_experts", f"{ROUTER}.kind"), problem))
    if config.model.moe.capacity is not None:
        problem = (
            f"model.moe.capacity: with {name} each expert takes its capacity and nothing is dropped; set "
            f"model.moe.capacity to null, and {ROUTER}.capacity to the share that an expert takes"
        )
        broken.append(Violation(("model.moe.capacity", f"{ROUTER}.kind"), problem))
    return broken


def _causal_violations(config: Config, section: ExpertChoiceRouterSection) -> list[Violation]:
    keys = (f"{ROUTER}.causal", "train.only")
    if section.causal is None:
        problem = (
            f"{ROUTER}.causal=null: held-out evaluation would choose among tokens by later ones, which no use of the model "
            f"knows; set {ROUTER}.causal=threshold, or auxiliary in a second stage"
        )
        return [Violation(keys[:1], problem)]
    if section.causal == "auxiliary" and config.train.only is None:
        problem = (
            f"{ROUTER}.causal=auxiliary: auxiliary routers are trained in a second stage, and train.only=null trains the "
            f"rest; train first with {ROUTER}.causal=threshold, then start a run with train.only=auxiliary_routers and "
            "run.init_from naming the first"
        )
        return [Violation(keys, problem)]
    if section.causal == "threshold" and config.train.only == "auxiliary_routers":
        problem = (
            f"train.only={config.train.only}: {ROUTER}.causal=threshold has no auxiliary routers; set "
            f"{ROUTER}.causal=auxiliary"
        )
        return [Violation(keys, problem)]
    return []


def _depth_violations(config: Config, section: ExpertChoiceRouterSection) -> list[Violation]:
    """What is known of a micro-batch beforehand is not known of the tokens that a layer of model.mixture_of_depths takes of it."""
    if config.model.mixture_of_depths is None or (section.scope == "rank" and not section.noise):
        return []
    said = f"scope={section.scope}" if section.scope != "rank" else f"noise={section.noise:g}"
    problem = (
        f"{ROUTER}.{said} with model.mixture_of_depths: which tokens reach the experts of such a layer is known "
        f"in it alone; set {ROUTER}.scope=rank and {ROUTER}.noise=0, or model.mixture_of_depths to null"
    )
    return [Violation((f"{ROUTER}.set", f"{ROUTER}.noise", "model.mixture_of_depths"), problem)]


def _stage_violations(config: Config) -> list[Violation]:
    broken = []
    if config.train.only != "auxiliary_routers":
        return broken
    if config.run.init_from is None:
        problem = (
            f"train.only={config.train.only}: freezes the model, and run.init_from=null leaves it untrained; set "
            "run.init_from to the run of the first stage"
        )
        broken.append(Violation(("train.only", "run.init_from"), problem))
    section = config.model.moe.router
    if isinstance(section, ExpertChoiceRouterSection) and section.noise:
        problem = (
            f"{ROUTER}.noise={section.noise:g}: the auxiliary routers of train.only={config.train.only} would learn "
            f"choices that the noise made; set {ROUTER}.noise=0"
        )
        broken.append(Violation(("train.only", f"{ROUTER}.noise"), problem))
    return broken
