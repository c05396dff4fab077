"""Bad input is refused before anything starts, with all problems at once. Accepted input is consistent."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_dist.config.load import load_config
from moe_dist.errors import ConfigError, DataError
from moe_dist.formats.manifest import load_manifest
from moe_dist.plan.preflight import Preflight, check, check_file, layout_without_data, token_mix
from tests.support.messages import refused
from tests.support.tiny import tiny_config, tiny_dataset, write_config

BALANCE = "model.moe.balance=[{kind: active_experts, target: "


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tiny_dataset(data := tmp_path_factory.mktemp("data") / "data")
    return data


class Site:
    """A configuration and a data set for a test to break."""

    def __init__(self, root: Path, made: Path) -> None:
        self.data = root / "data"
        shutil.copytree(made, self.data)
        self.config = write_config(tiny_config(self.data, root / "runs"), root / "run.yaml")

    def check(self, *overrides: str, **options: Any) -> Preflight:
        return check_file(self.config, overrides, **options)

    def problems(self, *overrides: str, error: type[ConfigError | DataError] = ConfigError, **options: Any) -> str:
        """Returns the error's text. The error must have exactly this class."""
        with pytest.raises((ConfigError, DataError)) as raised:
            self.check(*overrides, **options)
        assert type(raised.value) is error, raised.value
        assert "see docs/" in str(raised.value)
        return str(raised.value)

    def edit_manifest(self, change: Callable[[dict[str, Any]], None]) -> None:
        path = self.data / "manifest.json"
        values = json.loads(path.read_text())
        change(values)
        path.write_text(json.dumps(values))


@pytest.fixture
def site(tmp_path: Path, made: Path) -> Site:
    return Site(tmp_path, made)


def test_what_passes_fits_together(site: Site) -> None:
    plan = site.check()
    manifest = load_manifest(site.data)
    assert plan.manifest == manifest
    assert [group.name for group in plan.groups] == ["text", "image"]
    assert plan.placement.slots == ((0, 1, 2), (3, 4))
    counts = [source.train.tokens_by_modality for source in manifest.sources.values()]
    assert plan.token_mix == {name: sum(each.get(name, 0) for each in counts) for name in manifest.modalities}
    assert [each.name for each in plan.comparison.plans] == ["pinned", "interleaved"]
    assert check(plan.config, manifest=manifest) == plan
    assert check(plan.config, world_size=2) == plan


def test_weights_change_the_mix(site: Site) -> None:
    config = load_config(site.config, ["data.weights={prose: 3, captions: 1}"])
    manifest = load_manifest(site.data)
    mix = token_mix(config, manifest)
    pictures = manifest.sources["captions"].train
    share = pictures.tokens_by_modality["image"] / pictures.tokens / 4
    assert mix["image"] / sum(mix.values()) == pytest.approx(share, rel=1e-4)


def test_a_mix_that_the_manifest_leaves_out_is_counted(site: Site) -> None:
    before = site.check().token_mix

    def forget(values: dict[str, Any]) -> None:
        for source in values["sources"].values():
            del source["train"]["tokens_by_modality"]

    site.edit_manifest(forget)
    assert site.check().token_mix == before


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        (
            ["parallel.expert_gemm=grouped", "parallel.precision=bf16", "model.moe.groups.image.ffn_dim=20"],
            "model.moe.groups.image.ffn_dim=20: must be a multiple of 8 for parallel.expert_gemm=grouped in bf16 (rows of "
            "16 bytes); take 24, or parallel.expert_gemm=auto",
        ),
        (
            ["parallel.expert_gemm=grouped", "parallel.device=cuda"],
            "on CUDA torch has grouped kernels for bf16 only, but parallel.precision=fp32; take bf16",
        ),
        (
            ["model.mixture_of_depths={first: 2}"],
            "mixture_of_depths.first=2 leaves no mixture-of-depths layer among num_layers=2; lower it",
        ),
        (
            ["model.mixture_of_depths={every: 1}", "model.moe.first=1", "model.dense_ffn_dim=8"],
            "depths: layer 0 is a mixture-of-depths layer without",
        ),
        (["model.mixture_of_depths={scope: node}"], "model.mixture_of_depths.scope='node'"),
        (
            ["model.mixture_of_depths={}", "parallel.dispatch.kind=deep_ep_v2"],
            "parallel.dispatch.kind=deep_ep_v2: its buffers have room for",
        ),
        (["train.global_batch=2"], "= 4; take 4"),
        (
            ["parallel.edp=512", "train.global_batch=2048"],
            "parallel.ep x parallel.edp = 1024 ranks, but the data has only 192 training documents",
        ),
        (["model.moe.groups.text.modalities=[text, image]"], "modality 'image' is routed to text and image"),
        (["model.moe.groups.image.modalities=[picture]"], "no group routes the data's modality 'image'"),
        (["data.path=/nowhere"], "moe-dist prepare-data --out /nowhere"),
        (
            ["model.moe.balance=[{kind: loss_free}]"],
            "controllers change the selection bias, which model.moe.router does not have; set "
            "model.moe.router.selection_bias=true",
        ),
        (
            [f"{BALANCE}{{txt: 1.0}}, rate: 0.1}}]"],
            "0.target.txt: no such group; there are text, image; did you mean",
        ),
        ([f"{BALANCE}{{text: 2.5}}, rate: 0.1}}]"], "target.text=2.5: a token takes at most 2 true experts (top_k=2"),
        (
            [f"{BALANCE}{{text: 0.5}}, rate: 0.1}}]"],
            "target.text=0.5: a token takes at least 1 true experts, because at most 1",
        ),
        (
            [f"{BALANCE}{{image: 2.0}}, rate: 0.1}}]", "model.moe.groups.image.num_null=0"],
            "target.image=2: the group has neither null nor zero-computation experts, so that each token takes top_k=2 "
            "true experts",
        ),
        (
            ["model.moe.balance=[{kind: loss_free}, {kind: loss_free}]", "model.moe.router.selection_bias=true"],
            "2 controllers of kind loss_free; keep one",
        ),
        (["loss.balance.null_weight={txt: 2.0}"], "loss.balance.null_weight.txt: no such group"),
        (
            ["loss.balance.kind=vanilla", "loss.balance.null_weight={text: 2.0}"],
            "kind=vanilla gives every null expert",
        ),
        (
            ["run.init_rules=[upcycle]"],
            "run.init_rules=['upcycle']: there are no weights to change; set run.init",
        ),
        (
            ["run.init_rules=[copy_nulls]", "run.init_from=x"],
            "copy_nulls: model.moe.groups.text.num_null=1 is no multiple of num_experts=3, so that some true rows would "
            "have more copies than others; take 3",
        ),
    ],
)
def test_bad_configurations(site: Site, overrides: list[str], fault: str) -> None:
    assert fault in site.problems(*overrides)


def test_other_numbers_of_ranks_than_configured(site: Site) -> None:
    assert "3 ranks were started, but parallel.ep=2 x parallel.edp=1 = 2" in site.problems(world_size=3)


def cut(name: str, count: int) -> Callable[[Site], None]:
    def damage(site: Site) -> None:
        path = site.data / name
        path.write_bytes(path.read_bytes()[:-count])

    return damage


def remove(name: str) -> Callable[[Site], None]:
    return lambda site: (site.data / name).unlink()


def edit(*path: str, value: Any) -> Callable[[Site], None]:
    def change(values: dict[str, Any]) -> None:
        *above, last = path
        for key in above:
            values = values[key]
        values[last] = value

    return lambda site: site.edit_manifest(change)


def put_large_id(site: Site) -> None:
    ids = np.fromfile(site.data / "prose_train.bin", np.uint16)
    ids[-1] = 64
    ids.tofile(site.data / "prose_train.bin")


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (cut("captions_train.bin", 2), "captions_train.bin: 4030 bytes, but its .idx says 2016 tokens"),
        (cut("captions_valid.idx", 1), "cut short or damaged"),
        (cut("captions_valid.idx", 700), "cut short"),
        (remove("prose_train.bin"), "prose_train.bin: missing"),
        (remove("prose_valid.idx"), "prose_valid.idx: missing"),
        (remove("captions_train.filler"), "captions_train.filler"),
        (cut("captions_train.filler", 1), "captions_train.filler"),
        (edit("sources", "prose", "train", "documents", value=97), "has 96 documents, but its manifest says 97"),
        (edit("sources", "prose", "valid", "tokens_by_modality", value={}), None),
        (put_large_id, "prose_train.bin holds the id 64, but the manifest's vocab_size=64"),
        (edit("vocab_size", value=60), "modalities.image: [48, 64) lies outside [0, vocab_size=60)"),
        (edit("modalities", "image", value=[[48, 80]]), "modalities.image: [48, 80) lies outside [0, vocab_size=64)"),
        (edit("image", "end_id", value=64), "image.end_id=64 lies outside"),
        (edit("sources", "prose", "train", "tokens_by_modality", value={"text": 1}), "tokens_by_modality adds up to 1"),
        (edit("tokenizer", value="tokenizer.json"), "tokenizer.json is missing"),
        (edit("licence", value="x"), "licence: unknown key"),
    ],
)  # fmt: skip
def test_bad_data(site: Site, damage: Callable[[Site], None], fault: str | None) -> None:
    damage(site)
    if fault is None:
        site.check()
    else:
        assert fault in site.problems(error=DataError)


def test_tokens_that_disagree_with_the_index(site: Site) -> None:
    def change(values: dict[str, Any]) -> None:
        split = values["sources"]["prose"]["train"]
        split["tokens"] += 1
        split["tokens_by_modality"]["text"] += 1

    site.edit_manifest(change)
    assert "tokens, but its manifest says" in site.problems(error=DataError)


def test_everything_at_once(site: Site) -> None:
    cut("captions_train.bin", 2)(site)
    remove("prose_valid.idx")(site)
    edit("sources", "prose", "train", "documents", value=97)(site)
    text = site.problems(
        "train.stpes=3",
        "train.max_skipped_in_a_row=none",
        "run.name=a; touch x",
        "model.moe.groups.text.top_k=9",
        "model.vocab_size=40",
        "data.seq_len=128",
        "parallel.ep=3",
        "placement.groups.text.ranks=[7]",
        "data.weights={prose: 1, captoins: 2}",
        "train.global_batch=8",
        "model.moe.groups.image.modalities=[image, sound]",
    )
    for part in (
        "train.stpes",
        "train.max_skipped_in_a_row='none'",
        "run.name='a; touch x'",
        "top_k=9",
        "model.vocab_size=40",
        "data.seq_len=128",
        "[7] out of range",
        "data.weights.captoins",
        "train.global_batch=8: must be a multiple of train.micro_batch=2 x 3 ranks",
        "'sound': no such modality in the data",
        "captions_train.bin: 4030 bytes",
        "prose_valid.idx: missing",
        "manifest says 97",
    ):
        assert part in text, part


def test_nothing_follows_from_what_could_not_be_read(site: Site) -> None:
    text = site.problems("parallel.ep=two", "data.path=3\n4", "placement.groups.text.ranks=[1]")
    assert "parallel.ep='two'" in text
    for spurious in ("multiple", "out of range", "no manifest.json", "free for"):
        assert spurious not in text


def test_a_draft_without_sense_shows_its_problems(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("- 1\n")
    with refused(ConfigError):
        check_file(path)


def test_layout_for_a_dry_run_needs_no_data(site: Site) -> None:
    config = load_config(site.config)
    assert layout_without_data(config).token_mix == site.check().token_mix
    shutil.rmtree(site.data)
    layout = layout_without_data(config)
    assert layout.token_mix == {}
    assert layout.placement.slots == ((0, 1, 2), (3, 4))
    with refused(ConfigError):
        layout_without_data(load_config(site.config, ["data.seq_len=65"]))


def test_nodes_must_divide_the_ep_group(site: Site) -> None:
    text = site.problems("parallel.dispatch.kind=hierarchical", "parallel.dispatch.ranks_per_node=4")
    assert "parallel.dispatch.ranks_per_node=4: does not divide parallel.ep=2" in text
    assert "take 1 or 2, or change parallel.ep" in text
    site.check("parallel.dispatch.kind=hierarchical", "parallel.dispatch.ranks_per_node=1")
    assert "ranks_per_node" in site.problems("parallel.dispatch.kind=hierarchical"), "it has no default"


def test_one_row_a_pair_needs_known_counts(site: Site) -> None:
    text = site.problems("parallel.dispatch.kind=known_counts")
    assert "with model.moe.router.kind=top_k the tokens choose" in text
    assert "or set parallel.dispatch.kind=all_to_all" in text


STATIC = "parallel.dispatch.kind=static"


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        (["model.moe.router.kind=expert_choice"], f"model.moe.router.kind=expert_choice: {STATIC}: each"),
        (["model.mixture_of_depths={capacity: 0.5}"], f"model.mixture_of_depths: {STATIC}: the room is for"),
        (["parallel.expert_pair_budget=64"], f"parallel.expert_pair_budget=64: {STATIC}: pairs cannot be cut"),
        (["parallel.max_receive_rows=8"], f"parallel.max_receive_rows=8: {STATIC}: parallel.dispatch.room bounds the rows"),
        (["parallel.device=cuda"], "parallel.precision=fp32 and parallel.expert_gemm=auto; set them to bf16 and auto"),
        (["model.moe.experts={kind: ffn_lora, rank: 2, alpha: 4}"], f"model.moe.experts.kind=ffn_lora: {STATIC}: the host"),
        (["model.moe.experts={kind: clamped_ffn}"], f"model.moe.experts.kind=clamped_ffn: {STATIC}: the host"),
        (["parallel.dispatch.chunks=2"], "parallel.dispatch.chunks"),
        (["parallel.dispatch.room=0.5"], "parallel.dispatch.room"),
    ],
)  # fmt: skip
def test_fixed_sizes_refuse_what_they_cannot_hold(site: Site, overrides: list[str], fault: str) -> None:
    assert fault in site.problems(STATIC, *overrides)
    site.check(STATIC, "parallel.dispatch.room=2", "model.moe.capacity={factor: 1.0}")


def test_deep_ep_demands_all_at_once(site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kind = "parallel.dispatch.kind=deep_ep_v2"
    text = site.problems(kind, "parallel.max_receive_rows=8", "parallel.ep=1", "parallel.check_exchanges=true")
    for fault in (
        "the package deep_ep.buffers.elastic is not installed here; build DeepEP V2 from the main branch",
        "there is no other rank with parallel.ep=1",
        " must be a multiple of 256; change it",
        f"parallel.precision=fp32: {kind}: rows are sent in bf16",
        f"parallel.device=cpu: {kind}: its kernels need GPUs",
        f"parallel.max_receive_rows=8: {kind}: its kernels allocate the receive buffer",
        f"parallel.check_exchanges=true: {kind}: checks cannot see the rows that its kernels send",
    ):
        assert fault in text
    sound = (kind, "parallel.precision=bf16", "parallel.device=cuda", "model.hidden_dim=256")
    groups = "model.moe.groups.text={num_experts: 40, num_null: 1, top_k: 33, ffn_dim: 8, modalities: [text]}"
    assert "model.moe.groups.text.top_k=33 must be at most 32" in site.problems(*sound, groups)
    layout_without_data(load_config(site.config, sound))  # a dry run needs no data
    (tmp_path / "deep_ep").mkdir()
    (tmp_path / "deep_ep" / "__init__.py").write_text("raise ImportError('preflight must not import it')")
    monkeypatch.syspath_prepend(tmp_path)
    assert "deep_ep.buffers.elastic is not installed" in site.problems(*sound), "V1 lacks the module"
    (tmp_path / "deep_ep" / "buffers").mkdir()
    (tmp_path / "deep_ep" / "buffers" / "elastic.py").touch()
    site.check(*sound)


def test_a_new_number_of_tokens_in_each_step_is_not_compiled(site: Site) -> None:
    asked = ("parallel.compile=true", "model.mixture_of_depths={capacity: 0.5, scope: world}")
    assert "with model.mixture_of_depths.scope=world the number of computed tokens differs" in site.problems(*asked)
    site.check(asked[0])


def test_two_halves_of_a_micro_batch_name_what_they_cannot_be_combined_with(site: Site) -> None:
    key = "parallel.two_batch_overlap=true"
    text = site.problems(
        key, "train.micro_batch=1", "parallel.dispatch.chunks=2", "parallel.recompute=block", "parallel.data=fsdp2",
        "model.mixture_of_depths={}", "model.moe.capacity={factor: 1.0}",
    )  # fmt: skip
    for fault in (
        "train.micro_batch=1 has no two equal halves; make it even, or set parallel.two_batch_overlap=false",
        f"parallel.dispatch: {key}: rows are sent at once",
        f"parallel.recompute=block: {key}: a block would repeat exchanges",
        "set parallel.fsdp_gather=step",
        f"model.mixture_of_depths: {key}: tokens of both halves compete",
        "set model.mixture_of_depths=null",
        f"model.moe.capacity: {key}: tokens of both halves compete",
        "set model.moe.capacity=null",
    ):
        assert f"{key}: " in text
        assert fault in text
    choice = "model.moe.router={kind: expert_choice, causal: threshold}"
    assert "a token's experts must not depend on its micro-batch" in site.problems(key, "train.micro_batch=2", choice)
    site.check(key, "train.micro_batch=2", "parallel.recompute=experts")


def test_hybrid_ep_demands_all_at_once(site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kind = "parallel.dispatch.kind=hybrid_ep"
    text = site.problems(
        kind, "parallel.max_receive_rows=8", "parallel.ep=1", "parallel.check_exchanges=true", "train.micro_batch=1",
        "data.seq_len=30", "model.hidden_dim=72", "model.num_heads=9",
    )  # fmt: skip
    for fault in (
        "the package deep_ep and hybrid_ep_cpp is not installed here; build DeepEP from the branch hybrid-ep",
        "there is no other rank with parallel.ep=1",
        "a rank's tokens must be a multiple of 4, but train.micro_batch=1 times data.seq_len=30 is 30",
        "model.hidden_dim=72 must be a multiple of 16",
        f"parallel.precision=fp32: {kind}: rows are sent in bf16",
        f"parallel.device=cpu: {kind}: its kernels need GPUs",
        f"parallel.max_receive_rows=8: {kind}: its kernels allocate the receive buffer",
        f"parallel.check_exchanges=true: {kind}: checks cannot see the rows that its kernels send",
    ):
        assert fault in text
    sound = (kind, "parallel.precision=bf16", "parallel.device=cuda")
    assert "hybrid_ep_cpp is not installed" in site.problems(*sound)
    for module in ("deep_ep", "hybrid_ep_cpp"):
        (tmp_path / module).mkdir()
        (tmp_path / module / "__init__.py").write_text("raise ImportError('preflight must not import it')")
    monkeypatch.syspath_prepend(tmp_path)
    site.check(*sound)


def test_a_key_of_the_default_dispatcher_needs_no_kind(site: Site) -> None:
    assert site.check("parallel.dispatch.chunks=2").config.parallel.dispatch.kind == "all_to_all"
    assert "parallel.dispatch" in site.problems("parallel.dispatch.ranks_per_node=2")


def test_a_target_that_can_be_reached_passes(site: Site) -> None:
    bias = "model.moe.router.selection_bias=true"
    for text in (1.0, 1.3, 2.0):  # with 3 true and 1 null experts and k = 2, targets from 1 to 2 are possible
        plan = site.check(f"{BALANCE}{{text: {text}, image: 0.1}}, rate: 0.1}}, {{kind: loss_free}}]", bias)
        assert [section.kind for section in plan.config.model.moe.balance] == ["active_experts", "loss_free"]
