"""Tests every rule between keys: changes a valid configuration, and compares all resulting errors with a golden file.

A change is a list of overrides, as on the command line, with ` | ` between them. `tests/data/messages.json` has all error
texts of each change, with the value, the rule and the fix. Running the test with `MESSAGES=write` rewrites this file.
"""

from pathlib import Path

import pytest

from moe_dist.config.load import model_violations, read_draft, rule_violations
from tests.support.engine_run import CHANGES
from tests.support.messages import hold
from tests.support.tiny import tiny_config, write_config

CHOICE_GROUPS = (
    "model.moe.groups={text: {num_experts: 4, top_k: 1, ffn_dim: 16}, image: {num_experts: 2, top_k: 1, ffn_dim: 24}}"
)
OFF = "loss.balance.schedule=[[0, 0.0]] | loss.z=0.0"
CHOICE = f"model.moe.router={{kind: expert_choice, causal: threshold}} | {OFF}"
AUXILIARY = "model.moe.router={kind: expert_choice, causal: auxiliary}"
SCHEDULED = "model.moe.router={kind: expert_choice, causal: threshold, capacity_schedule: "
SOFTMAX = "model.moe.router={kind: expert_choice, causal: threshold, score: softmax"
STARTED = "run.init_from=runs/base"
ADAPTED = f"{STARTED} | run.init_rules=[adapt] | train.only=adapters"
GROUP_LIMITED = (
    "model.moe.groups={text: {num_experts: 8, num_null: 2, top_k: 4, ffn_dim: 16}, "
    "image: {num_experts: 4, top_k: 2, ffn_dim: 24}} | model.moe.router={kind: group_limited"
)
TARGET = "model.moe.balance=[{kind: active_experts, rate: 1.0, target: "
DYNAMIC = "model.rope_scaling={kind: dynamic, factor: 2.0, original_max_position_embeddings: 8}"
MEGATRON = "engine={kind: megatron, cpu_trial: true"
TUNED = "router_tuning={data: none, last_layers: 1"

# The configuration of tests/support/tiny.py with some changes. Each base is valid, and the tests make further changes
# to it.
BASES = {
    "tiny": "run.seed=0",
    "expert choice": f"{CHOICE_GROUPS} | {CHOICE}",
    "all experts": f"{CHOICE_GROUPS} | model.moe.groups.text.top_k=4 | model.moe.groups.image.top_k=2 | {CHOICE}",
    "second stage": f"{CHOICE_GROUPS} | {AUXILIARY} | {OFF} | {STARTED} | train.only=auxiliary_routers",
    "group-limited": f"{GROUP_LIMITED}}}",
    "gating residual": "model.moe.router={kind: gating_residual}",
    "LoRA experts": f"{ADAPTED} | model.moe.experts={{kind: lora, rank: 2, alpha: 4.0}} | "
    "placement={policy: interleaved} | model.moe.router={normalise: none} | "
    "model.moe.groups.image={num_experts: 2, top_k: 2, ffn_dim: 16}",
    "attention LoRA": f"{ADAPTED} | model.attention_lora={{rank: 2, alpha: 4.0}}",
    "router tuning": f"{STARTED} | train.only=routers | {TUNED}}}",
    "copied nulls": f"{STARTED} | run.init_rules=[copy_nulls] | model.moe.groups.text.num_null=3 | "
    "model.moe.groups.text.top_k=4 | model.moe.groups.image.num_null=4 | model.moe.groups.image.top_k=3",
    "static": "parallel.dispatch={kind: static}",
    "dealing": "rank_balance.dealing=true",
    "moving": "rank_balance.moving={}",
    "replicating": "rank_balance.replicating={}",
    "Megatron": " | ".join(f"{key}={str(value).replace(chr(39), '')}" for key, value in CHANGES.items())
    + f" | model.moe.shared_gate=true | parallel.ep=2 | parallel.edp=2 | {MEGATRON}}}",
}  # fmt: skip

SOUND = {
    "tiny": (
        "model.moe.router.selection_bias=true | " + TARGET + "{text: 1.0, image: 0.1}}, {kind: loss_free}]",
        TARGET + "{text: 2.0}}] | model.moe.router.selection_bias=true",
        "data.skip=[[0, 4], [5, 5]]",
        "parallel.compile=true",
        "parallel.two_batch_overlap=true | parallel.recompute=experts",
        "parallel.dispatch={kind: hierarchical, ranks_per_node: 1}",
        "parallel.dispatch.chunks=2",
        f"train.only=experts | {STARTED} | {OFF}",
    ),
    "expert choice": (
        SOFTMAX + "}",
        SCHEDULED + "[[0, 4.0], [9, 1.0]], capacity: {image: 0.25}}",
        "parallel.dispatch={kind: known_counts}",
    ),
    "group-limited": tuple(f"{GROUP_LIMITED}, n_group: 2, topk_group: {count}}}" for count in (1, 2)),
    "router tuning": (
        TUNED + ", weight: 0.0}",
        "router_tuning={data: none, last_layers: 2}",
        TUNED + ", layers: [0]}",
        TUNED + ", regulariser: l2}",
    ),
    "static": ("parallel.dispatch.room=2.0 | model.moe.capacity={factor: 1.0}",),
    "replicating": tuple(
        f"parallel.dispatch={{{kind}}}" for kind in ("overlap: true", "chunks: 2", "kind: hierarchical, ranks_per_node: 1")
    ),
    "Megatron": (
        f"{CHOICE_GROUPS} | {MEGATRON}, pp: 2}} | {OFF} | "
        "model.moe.router={kind: expert_choice, causal: threshold, scope: ep_group}",
    ),
}

REFUSED = {
    "tiny": (
        "model.moe.groups.text.top_k=5",
        "model.num_kv_heads=3",
        "model.hidden_dim=30",
        "model.head_dim=7",
        "model.moe.every=2",
        "model.moe.shared_gate=true",
        "model.moe.first=2",
        "loss.balance.schedule=[[5, 0.1]]",
        "data.skip=[[3, 2]]",
        "data.skip=[[0, 4], [4, 5]]",
        "data.skip=[[7, 9], [0, 1]]",
        "run.keep_position=true",
        "model.sliding_layers=[0]",
        "model.sliding_window=4 | model.sliding_layers=[0, 99]",
        "model.sliding_window=4 | model.sliding_layers=[]",
        "model.rope_scaling={kind: linear}",
        "model.rope_scaling={kind: longrope, factor: 2.0}",
        "model.rope_scaling={kind: llama3, factor: 8.0, original_max_position_embeddings: 8, low_freq_factor: 4.0, "
        "high_freq_factor: 4.0}",
        f"{DYNAMIC} | model.head_dim=2",
        f"{DYNAMIC} | model.head_dim=8 | model.rope_dim=2",
        "model.head_dim=8 | model.rope_dim=3",
        "model.head_dim=8 | model.rope_dim=10",
        "model.attention={kind: latent, kv_rank: 8}",
        "model.attention={kind: latent, kv_rank: 8, value_dim: 8} | model.qk_norm=head | model.attention_bias=qkv",
        "model.moe.shortcut=true",
        "model.moe.shortcut=true | model.moe.shared_ffn_dim=8 | model.mixture_of_depths={first: 0}",
        "model.moe.shortcut=true | model.moe.shared_ffn_dim=8 | model.moe.every=2 | model.num_layers=3 | "
        "model.dense_ffn_dim=8",
        "parallel.expert_gemm=grouped | parallel.precision=bf16 | model.moe.groups.image.ffn_dim=20",
        "parallel.expert_gemm=grouped | parallel.device=cuda",
        "model.mixture_of_depths={first: 2}",
        "model.mixture_of_depths={every: 1} | model.moe.first=1 | model.dense_ffn_dim=8",
        "model.mixture_of_depths={scope: node}",
        "train.global_batch=2",
        "data.seq_len=65",
        "model.moe.groups.text.modalities=[text, image]",
        "model.moe.balance=[{kind: loss_free}]",
        "model.moe.balance=[{kind: loss_free}, {kind: loss_free}] | model.moe.router.selection_bias=true",
        TARGET + "{txt: 1.0}}] | model.moe.router.selection_bias=true",
        TARGET + "{text: 2.5}}] | model.moe.router.selection_bias=true",
        TARGET + "{text: 0.5}}] | model.moe.router.selection_bias=true",
        TARGET + "{image: 2.0}}] | model.moe.router.selection_bias=true | model.moe.groups.image.num_null=0",
        "loss.balance.null_weight={txt: 2.0}",
        "loss.balance.kind=vanilla | loss.balance.null_weight={text: 2.0}",
        "model.moe.router={logit_bias: true}",
        "train.only=adapters | run.init_from=x | run.init_rules=[adapt]",
        "train.only=experts",
        "train.frozen=routers",
        "parallel.watchdog_seconds=50",
        "parallel.compile=true | model.mixture_of_depths={capacity: 0.5, scope: world}",
        "parallel.dispatch={kind: hierarchical, ranks_per_node: 4}",
        "parallel.dispatch={kind: hierarchical}",
        "parallel.dispatch.ranks_per_node=2",
        "parallel.dispatch={kind: known_counts}",
        "parallel.dispatch={kind: deep_ep_v2} | model.mixture_of_depths={}",
        "parallel.dispatch={kind: deep_ep_v2} | parallel.max_receive_rows=8 | parallel.ep=1",
        "parallel.dispatch={kind: deep_ep_v2} | parallel.precision=bf16 | parallel.device=cuda | model.hidden_dim=256 | "
        "model.moe.groups.text={num_experts: 40, num_null: 1, top_k: 33, ffn_dim: 8}",
        "parallel.dispatch={kind: hybrid_ep} | parallel.max_receive_rows=8 | parallel.ep=1 | "
        "train.micro_batch=1 | data.seq_len=30 | "
        "model.hidden_dim=72 | model.num_heads=9 | model.num_kv_heads=3",
        "parallel.two_batch_overlap=true | train.micro_batch=1 | parallel.dispatch.chunks=2 | parallel.recompute=block | "
        "parallel.data=fsdp2 | model.mixture_of_depths={} | model.moe.capacity={factor: 1.0}",
    ),
    "expert choice": (
        "loss.z=0.001",
        "model.moe.groups.text={num_experts: 2, num_identity: 1, top_k: 3, ffn_dim: 16}",
        "model.moe.capacity={factor: 1.0}",
        "model.moe.router={kind: expert_choice}",
        AUXILIARY,
        "train.only=auxiliary_routers | run.init_from=x",
        "model.mixture_of_depths={} | model.moe.router={kind: expert_choice, causal: threshold, noise: 0.5}",
        "model.mixture_of_depths={} | model.moe.router={kind: expert_choice, causal: threshold, scope: world}",
        SCHEDULED + "[[0, 0.5], [5, 0.75]]} | model.mixture_of_depths={}",
        "model.moe.router={kind: expert_choice, causal: threshold, capacity: {txt: 0.5}}",
        SCHEDULED + "[[0, 1.0], [5, 3.0]], capacity: {text: 0.5}}",
        SCHEDULED + "[[5, 1.0]]}",
        f"model.moe.groups.text.num_experts=1 | {SOFTMAX}}}",
        SOFTMAX + ", noise: 0.5}",
        "parallel.two_batch_overlap=true",
        "parallel.dispatch={kind: static}",
        "parallel.dispatch={kind: deep_ep_v2}",
        "parallel.dispatch={kind: known_counts} | model.moe.router={kind: expert_choice, causal: threshold, scope: world}",
        "rank_balance.dealing=true",
        "rank_balance.replicating={}",
    ),
    "all experts": (
        "model.moe.router={kind: top_p} | " + TARGET + "{text: 0.5}}]",
        "model.moe.router={kind: relu} | " + TARGET + "{text: 5.0}}]",
        "model.moe.router={kind: relu} | " + TARGET + "{text: 1.5}, schedule: [[0, 4.0], [9, 1.0]]}]",
        "model.moe.router={kind: threshold} | model.moe.balance=[{kind: loss_free}]",
        "model.moe.router={kind: expert_threshold} | parallel.dispatch={kind: known_counts}",
    ),
    "second stage": (
        "run.init_from=null",
        "model.moe.router={kind: expert_choice, causal: auxiliary, noise: 1.0}",
        "model.moe.router={kind: expert_choice, causal: auxiliary, capacity_schedule: [[0, 0.5], [5, 0.75]]}",
    ),
    "group-limited": (
        f"{GROUP_LIMITED}, n_group: 2, topk_group: 3}}",
        f"{GROUP_LIMITED}, n_group: 3}}",
        f"{GROUP_LIMITED}, n_group: 4}} | model.moe.groups.text.top_k=5",
        f"{GROUP_LIMITED}, n_group: 4, topk_group: 1}} | model.moe.groups.text.top_k=5",
    ),
    "gating residual": (
        "model.mixture_of_depths={}",
        f"{MEGATRON}}}",
        "parallel.two_batch_overlap=true",
    ),
    "LoRA experts": (
        "train.only=null",
        "train.frozen=routers",
        "run.init_from=null",
        "run.init_rules=[adapt, upcycle]",
        CHOICE,
        "model.moe.router={}",
        "model.moe.router={normalise: none, scale: 2.0}",
        "model.moe.capacity={factor: 1.0}",
        "model.moe.groups.image={num_experts: 2, top_k: 1, ffn_dim: 24}",
        "model.moe.groups.text.num_identity=1",
        "placement={policy: pinned}",
        "parallel.dispatch={kind: all_to_all, overlap: true}",
        "parallel.expert_pair_budget=10",
        "model.mixture_of_depths={capacity: 0.5}",
        "model.moe.experts.rank=0",
        "model.moe.experts.alpha=-1",
        "model.moe.experts.dropout=1",
        "model.moe.experts.targets=[gate, q]",
        "model.moe.experts.targets=[]",
        "model.moe.experts.weight=hard",
        "model.moe.experts={kind: dora}",
        "model.moe.shortcut=true | model.moe.shared_ffn_dim=8",
    ),
    "attention LoRA": (
        CHOICE,
        "model.attention_lora={rank: 2, alpha: 4.0, targets: [q, q]}",
        "model.attention_lora={rank: 2, alpha: 4.0, targets: [query]}",
        "model.attention={kind: latent, kv_rank: 8, value_dim: 8}",
        "parallel.compile=true",
    ),
    "router tuning": (
        "router_tuning=null",
        "train.only=auxiliary_routers",
        "run.init_from=null",
        "run.init_rules=[upcycle]",
        "loss.z=0.1",
        "run.keep_position=true",
        "model.moe.router={kind: expert_choice, causal: threshold}",
        "model.mixture_of_depths={capacity: 0.5}",
        "model.moe.router={selection_bias: true} | model.moe.balance=[{kind: loss_free}]",
        "router_tuning={data: none}",
        TUNED + ", layers: [1, 2]}",
        TUNED + ", layers: [1, 1]}",
        TUNED + ", weight: 0.0} | model.moe.groups.text.top_k=1 | model.moe.groups.image.top_k=1",
        "data.skip=[[0, 1]]",
        TUNED + ", random_neighbours: true, neighbours: {kind: radius}}",
        TUNED + ", refresh_every: 5, regulariser: l2}",
        TUNED + ", refresh_every: 5, weight: 0.0}",
    ),
    "copied nulls": (
        "run.init_rules=[upcycle, upcycle]",
        "model.moe.groups.text.num_null=4",
        "model.moe.router={null_logit: single}",
        CHOICE,
        "model.moe.groups.text.num_null=0 | model.moe.groups.text.top_k=2 | "
        "model.moe.groups.image.num_null=0 | model.moe.groups.image.top_k=1",
        "run.init_rules=[split, upcycle]",
        "run.init_rules=[split] | model.moe.groups.text.top_k=2",
        "run.init_rules=[split] | model.moe.router={normalise: all_chosen}",
        f"run.init_rules=[split] | {CHOICE}",
        "run.init_rules=[split] | model.moe.groups.image.num_constant=1",
        "run.init_rules=[split] | model.moe.experts={kind: clamped_ffn}",
    ),
    "static": (
        "model.mixture_of_depths={capacity: 0.5}",
        "parallel.expert_pair_budget=64",
        "parallel.max_receive_rows=8",
        "parallel.dispatch.kind=static | parallel.device=cuda",
        "model.moe.experts={kind: ffn_lora, rank: 2, alpha: 4}",
        "parallel.dispatch.chunks=2",
        "parallel.dispatch.room=0.5",
    ),
    "dealing": (
        "model.moe.capacity={factor: 1.5}",
        "model.mixture_of_depths={capacity: 0.5}",
    ),
    "moving": ("parallel.dispatch={kind: deep_ep_v2}",),
    "replicating": (
        "rank_balance.moving={}",
        "model.moe.experts={kind: clamped_ffn}",
        "parallel.dispatch={kind: static, room: 2.0}",
        "parallel.two_batch_overlap=true",
    ),
    "Megatron": (
        f"{MEGATRON}, tp: 3}}",
        f"parallel.ep=4 | parallel.edp=1 | {MEGATRON}, pp: 2}}",
        f"model.num_layers=3 | {MEGATRON}, pp: 2}}",
        f"{MEGATRON}, pp: 2, layers: [1, 2, 1]}}",
        f"{MEGATRON}, vpp: 2}}",
        f"train.global_batch=6 | {MEGATRON}, tp: 2, pp: 2, vpp: 2}}",
        f"data.seq_len=62 | {MEGATRON}, cp: 2}}",
        f"train.global_batch=2 | {MEGATRON}, tp: 2}}",
        "engine={kind: megatron, tp: 2}",
        f"parallel.device=cuda | {MEGATRON}}}",
        f"{CHOICE_GROUPS} | {MEGATRON}, tp: 2}} | {OFF} | "
        "model.moe.router={kind: expert_choice, causal: threshold, scope: ep_group}",
        "model.moe.groups.text={num_experts: 3, num_identity: 1, top_k: 2, ffn_dim: 16} | "
        "model.attention_lora={rank: 2, alpha: 4.0} | loss.balance.scope=step | rank_balance.dealing=true | "
        "rank_balance.moving={} | parallel.deterministic=true | parallel.recompute=block | parallel.compile=true | "
        "monitor.profile={steps: [1, 2]} | run.init_from=elsewhere | run.init_rules=[copy_nulls]",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tiny_config(Path("none"), Path("runs")), tmp_path_factory.mktemp("rules") / "run.yaml")


def faults(file: Path, base: str, change: str) -> list[str]:
    read = read_draft(file, [*BASES[base].split(" | "), *change.split(" | ")])
    config = read.value
    violations = [] if config is None else [*model_violations(config), *rule_violations(config)]
    return [*read.problems, *read.broken(violations)]


@pytest.mark.parametrize(
    ("base", "change"), [(base, change) for base in BASES for change in ("run.seed=0", *SOUND.get(base, ()))]
)
def test_what_fits_passes(file: Path, base: str, change: str) -> None:
    assert faults(file, base, change) == []


CASES = {f"{base}-{change}": (base, change) for base, every in REFUSED.items() for change in every}


@pytest.mark.parametrize(("base", "change"), CASES.values(), ids=CASES)  # the golden file's keys are these ids
@pytest.mark.slow
def test_what_does_not_fit_is_named_with_its_rule_and_fix(file: Path, base: str, change: str) -> None:
    found = faults(file, base, change)
    names = [name for override in change.split(" | ") for name in override.partition("=")[0].split(".")[-2:]]
    assert any(name in fault for name in names for fault in found), found
    hold("\n".join(found))
