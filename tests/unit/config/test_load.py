"""Loading a configuration applies overrides, reports all problems at once, and knows which keys may differ on resume."""

import re
from pathlib import Path

import pytest

from moe_dist.config import keys, partial
from moe_dist.config.load import Change, changes_on_resume, difference, load_config, resolved_yaml
from moe_dist.config.optimizers.base import ConstantSchedule
from moe_dist.config.parallel.section import ExplicitSection, InterleavedSection
from moe_dist.config.sinks.kinds import JsonlSinkSection, TensorBoardSinkSection
from moe_dist.errors import ConfigError

CONFIGS = Path(__file__).parents[3] / "configs"
CHOICE = "model.moe.router.kind=expert_choice"


def problems(path: Path, *overrides: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as raised:
        load_config(path, overrides)
    assert raised.value.exit_code == 78
    return raised.value.problems


@pytest.mark.parametrize("preset", sorted(CONFIGS.glob("*.yaml")), ids=lambda preset: preset.stem)
@pytest.mark.slow
def test_every_preset_loads(preset: Path) -> None:
    config = load_config(preset)
    assert re.fullmatch(r"[a-z0-9_]+_[a-z0-9]+_[a-z0-9]+", preset.stem)
    assert config.run.name != ""


def test_an_override_reaches_into_a_list_that_the_file_leaves_to_its_default(path: Path) -> None:
    path.write_text("".join(line for line in path.read_text().splitlines(True) if not line.startswith("monitor:")))
    config = load_config(path, ["monitor.sinks.0.every=5", "monitor.sinks.2.pictures_every=7"])
    assert [sink.kind for sink in config.monitor.sinks] == ["console", "jsonl", "tensorboard"]
    assert (config.monitor.sinks[0].model_dump()["every"], config.monitor.sinks[2].model_dump()["pictures_every"]) == (5, 7)
    assert load_config(path, ["loss.balance.schedule.0=[0, 0.5]"]).loss.balance.schedule == ((0, 0.5),)
    assert "monitor.sinks.3 is not there" in problems(path, "monitor.sinks.3.every=5")[0]


def test_overrides(path: Path) -> None:
    config = load_config(
        path,
        [
            "train.steps=200",
            "optimizer.lr=1e-4",
            "optimizer.clip_norm=null",
            "optimizer.betas=[0.8, 0.9]",
            "model.moe.groups.text.top_k=3",
            "model.moe.router.normalise=none",
            "data.weights={prose: 1, captions: 2.5}",
            "monitor.sinks=[{kind: jsonl}, {kind: tensorboard, pictures_every: 7}]",
            "monitor.sinks.1.pictures_every=9",
            "loss.balance.schedule=[[0, 0.02], [100, 1e-4]]",
            "train.steps=300",
        ],
    )
    assert config.train.steps == 300
    assert config.optimizer.lr == 1e-4
    assert config.optimizer.clip_norm is None
    assert config.optimizer.betas == (0.8, 0.9)
    assert config.model.moe.groups["text"].top_k == 3
    assert config.model.moe.router.normalise == "none"
    assert config.data.weights == {"prose": 1.0, "captions": 2.5}
    assert config.monitor.sinks == (JsonlSinkSection(), TensorBoardSinkSection(pictures_every=9))
    assert config.loss.balance.schedule == ((0, 0.02), (100, 1e-4))


def test_one_share_or_a_share_for_each_group(path: Path, tmp_path: Path) -> None:
    one, text = "model.moe.router.capacity=0.5", "model.moe.router.capacity.text=0.25"
    for overrides, expected in (([one], 0.5), ([text], {"text": 0.25}), ([], None)):
        config = load_config(path, [CHOICE, *overrides])
        assert config.model.moe.router.model_dump()["capacity"] == expected
        copy = tmp_path / "config.yaml"
        copy.write_text(resolved_yaml(config))
        assert load_config(copy) == config
    schedule = load_config(path, [CHOICE, "model.moe.router.capacity_schedule=[[0, 2], [9, 1.0]]"])
    assert schedule.model.moe.router.model_dump()["capacity_schedule"] == ((0, 2.0), (9, 1.0))
    assert "capacity is 0.5, which has no 'text'" in problems(path, CHOICE, one, text)[0]


def test_another_variant_drops_the_keys_of_the_old(path: Path) -> None:
    config = load_config(path, ["placement.policy=interleaved", "optimizer.schedule.kind=constant"])
    assert config.placement == InterleavedSection()
    assert config.optimizer.schedule == ConstantSchedule(warmup_steps=2)
    slots = "placement.slots=[[text/0, text/1], [text/2, image/0, image/1]]"
    for order in (["placement.policy=explicit", slots], [slots, "placement.policy=explicit"]):
        assert isinstance(load_config(path, order).placement, ExplicitSection)
    assert "placement.slots" in problems(path, slots, "placement.policy=interleaved")[0]


@pytest.mark.parametrize(
    ("name", "read"), [("2024", "2024"), ("1e5", "1e5"), ("no", "no"), ("on", "on"), ("true", "true"), ("'7'", "7")]
)
def test_names_stay_text(path: Path, name: str, read: str) -> None:
    assert load_config(path, [f"run.name={name}"]).run.name == read


def test_a_number_as_name_in_a_file_must_be_quoted(path: Path) -> None:
    path.write_text(path.read_text().replace("name: small", "name: 2024"))
    assert any("run.name=2024" in fault and "put it in quotes" in fault for fault in problems(path))
    path.write_text(path.read_text().replace("name: 2024", "name: no"))
    assert load_config(path).run.name == "no"


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        (["train.stpes=5"], "train.stpes: unknown key; did you mean train.steps?"),
        (["optimizer.moments=bf16"], "optimizer.moments: was removed; remove the key"),
        (["train.lr=5"], "train.lr: unknown key; did you mean optimizer.lr?"),
        (["run.name.zzz=5"], "run.name.zzz: unknown key; run.name is a value, not a section: remove .zzz"),
        (["optimizer.schedule.kind={a: 1}"], "optimizer.schedule.kind"),
        (["model.moe.groups.text.topk=1"], "did you mean model.moe.groups.text.top_k?"),
        (["placement.slots=[[text/0]]"], "placement.slots: belongs to policy: explicit"),
        (
            ["placement.policy=pined"],
            "placement.policy='pined'; must be one of 'interleaved', 'pinned', 'explicit'; did you",
        ),
        (["train.steps=many"], "train.steps='many': must be whole number, 1 or more (Optimizer steps of the whole run.)"),
        (["train.steps=2.5"], "train.steps=2.5: must be whole number"),
        (["train.steps=0"], "train.steps=0: must be whole number, 1 or more"),
        (["model.tie_embeddings=yes"], "model.tie_embeddings='yes': must be true or false"),
        (["optimizer.lr=.inf"], "optimizer.lr=inf: must be number, above 0"),
        (["optimizer.betas=[0.9]"], "optimizer.betas.1: missing; give number, 0 or more, below 1"),
        (["parallel.data=fsdp"], "parallel.data='fsdp': must be one of 'ddp', 'fsdp2'; did you mean 'fsdp2'?"),
        (["train=5"], "train=5: must be section with the keys steps, global_batch"),
        (["model.moe.groups={}"], "model.moe.groups={}: must be mapping from names"),
        (["monitor.sinks=[{kind: consle}]"], "monitor.sinks.0.kind='consle'; must be one of"),
        (["monitor.sinks=[{every: 1}]"], "monitor.sinks.0.kind: missing; must be one of"),
        (["monitor.sinks.7.every=1"], "monitor.sinks.7.every: monitor.sinks.7 is not there"),
        (["train.steps"], "'train.steps': an override is key=value"),
        (["=5"], "'=5': an override is key=value"),
        (["train.steps", "=", "5"], "train.steps = 5: an override has no spaces around =; write train.steps=5"),
        (["train.steps=[1"], "train.steps: line 1, column 1 ('[1'): the list that begins here with [ is not closed; add ]"),
        (
            [CHOICE, "model.moe.router.capacity=2"],
            "capacity=2: must be number, above 0, 1 or less; or mapping from names",
        ),
        (
            [CHOICE, "model.moe.router.capacity.text=2"],
            "model.moe.router.capacity.text=2: must be number, above 0",
        ),
        (
            [CHOICE, "model.moe.router.capacity={a.b: 1}"],
            "capacity.a.b: the name 'a.b' must be text of 1 to 32",
        ),
        (["data.path="], "data.path=''"),
        (["model.moe.groups={a.b: {num_experts: 1, top_k: 1, ffn_dim: 2}}"], "the name 'a.b' must be text of 1 to 32"),
        (["model.num_layers=1048576"], "model.num_layers=1048576: must be whole number from 1 to 4,096"),
        (["model.moe.groups.text.num_experts=1048576"], "experts are more than 524,288 experts; lower num_layers"),
        (["model.num_layers=4000", "model.moe.groups.text.num_experts=100000"], "lower num_layers"),
        (["model.hidden_dim=4000000000000000"], "model.hidden_dim: more than 2,147,483,647 is not possible"),
        ([f"train.steps={10**4200}"], "train.steps: more than 9,007,199,254,740,992 is not possible"),
        (["data.weights={openmoji:0.5,python: 0.5}"], "put a space after the colon"),
        (["model.num_heads=four"], "model.num_heads='four'"),  # one error only: rules do not run on the wrong value
    ],
)
def test_a_fault_is_named_with_its_way_out(path: Path, overrides: list[str], fault: str) -> None:
    found = problems(path, *overrides)
    assert len(found) == 1, found
    assert fault in found[0]


@pytest.mark.parametrize(
    "name", ["a; touch x", "../up", "a/b", '"a\\nb"', '"a\\n"', "-rf", ".", "", "a" * 65, "$(x)", "'a b'"]
)
def test_names_that_are_no_names(path: Path, name: str) -> None:
    found = problems(path, f"run.name={name}")
    assert len(found) == 1
    assert "run.name" in found[0]
    assert "letters, digits" in found[0]
    assert "\n" not in found[0]


def test_paths_without_control_characters(path: Path) -> None:
    assert "without control characters" in problems(path, 'data.path="a\\nb"')[0]
    assert "without control characters" in problems(path, "data.path=a\nb")[0]
    for text in ("/mnt/a b/ü", "a # b", "a: b", "[x", "~", "null"):
        assert load_config(path, [f"data.path={text}"]).data.path == text


@pytest.mark.parametrize(
    ("text", "last"),
    [
        ("\n".join(f"key{index}: 1" for index in range(3_000)), "and "),
        ("train:\n" + "\n".join(f"  steps{index}: 1" for index in range(3_000)), "and "),
        (f"placement: {{groups: {{text: {{ranks: [{'x,' * 19_000}]}}}}}}", "run, model, data, "),
    ],
    ids=["keys", "keys of a section", "items"],
)
@pytest.mark.slow
def test_a_file_with_thousands_of_faults_is_refused_after_the_first_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, last: str
) -> None:
    asked: list[str] = []
    real = keys.nearest
    for module in (keys, partial):
        monkeypatch.setattr(module, "nearest", lambda root, name: asked.append(name) or real(root, name))
    (tmp_path / "x.yaml").write_text(text)
    found = problems(tmp_path / "x.yaml")
    assert len(found) <= partial.MOST_FAULTS + 1
    assert len(asked) <= 2 * partial.MOST_FAULTS, "each search for a similar key takes milliseconds"
    assert any(problem.startswith(last) for problem in found)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("run: {name: a}\nrun: {name: b}\n", "'run' is in line 1 and again in line 2"),
        ("run: {name: a\nmodel: {}\n", "line 1, column 6 ('run: {name: a'): the mapping that begins here with { is not"),
        ("run: {name: a: b}\n", "in the mapping that begins with { in line 1, a comma or } must follow each value"),
        ("run: {name: a\n", "the mapping that begins here with { is not closed; add }"),
        ("- 1\n", "must be a mapping of sections"),
        ("just text", "must be a mapping of sections"),
        ("run: !!python/object/apply:os.system [ls]\n", "no value may name its type (!...); write plain values"),
        ("a: &a [*a]\n", "contains its own alias"),
        (
            "",
            "run, model, data, train, optimizer, evaluation: these sections are missing; "
            "start from a complete configuration: `moe-dist show moma_tiny_cpu > new.yaml`",
        ),
        (
            "engine: {kind: transformers}\nrun: {name: a}\nmodel: {folder: nowhere}\n",
            "data, train, optimizer, evaluation: these sections are missing; "
            "start from a complete configuration: the first one of docs/hf-engine.md",
        ),
    ],
)
def test_files_that_are_no_configuration(tmp_path: Path, text: str, fault: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    assert any(fault in found for found in problems(path))


def test_resolved_yaml_loads_back_equal(path: Path, tmp_path: Path) -> None:
    config = load_config(
        path, ["run.name=1e5", "run.root=no", "optimizer.lr=1e-7", "monitor.sinks=[{kind: wandb, project: '1'}]"]
    )
    copy = tmp_path / "config.yaml"
    copy.write_text(resolved_yaml(config))
    assert load_config(copy) == config


def test_difference(path: Path) -> None:
    old = load_config(path)
    new = load_config(
        path, ["placement.policy=interleaved", "train.steps=9", "optimizer.eps=1e-6", "model.moe.groups.text.top_k=1"]
    )
    assert difference(old, old) == []
    assert difference(old, new) == [
        Change("model.moe.groups.text.top_k", 2, 1),
        Change("train.steps", 4, 9),
        Change("optimizer.eps", 1e-8, 1e-6),
        Change("placement.policy", "pinned", "interleaved"),
        Change("placement.groups.text.ranks", [0], None),
        Change("placement.groups.text.node.labels", {}, None),
        Change("placement.groups.text.node.own", False, None),
    ]
    assert [change.key for change in changes_on_resume(old, new)] == ["model.moe.groups.text.top_k", "optimizer.eps"]


def test_the_root_may_change_on_resume_and_the_name_not(path: Path) -> None:
    old, new = (
        load_config(path),
        load_config(path, ["run.root=/elsewhere", "data.path=/there", "run.name=b", "parallel.ep=4"]),
    )
    assert [change.key for change in changes_on_resume(old, new)] == ["run.name"]
