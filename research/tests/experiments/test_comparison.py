"""A comparison refuses runs that it cannot compare, fits each method into its budget, and makes a table and a figure."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from moe_dist.config.load import load_config
from moe_dist.errors import ConfigError
from moe_dist.formats.manifest import load_manifest
from moe_dist.plan.preflight import check
from research.compare_methods import _rates
from research.experiments.comparison import Comparison, make_study, write_comparison
from research.experiments.load_controls import SUFFIX, check_modalities
from research.experiments.methods import METHODS
from research.experiments.rank_seconds import first_jobs
from research.experiments.rate_search import best_rates, make_search
from research.experiments.results import results_path
from research.experiments.study import config_of, find_file, fingerprint, jobs_of
from tests.support.cover import rest_full
from tests.support.tiny import tiny_config, tiny_dataset, write_config

GROUP = {"num_experts": 4, "top_k": 2, "ffn_dim": 8, "modalities": ["text", "image"]}
CHANGES: dict[str, Any] = {
    "model.moe.groups": {"all": GROUP},
    "parallel.ep": 1,
    "placement.policy": "interleaved",
    "train.steps": 20,
}
DOCUMENTS = 2700  # enough documents for held-out sequences besides the 192 that a comparison measures


def asked(root: Path, data: Path, changes: dict[str, Any] | None = None, **other: Any) -> Comparison:
    base = write_config(tiny_config(data, root / "runs", {**CHANGES, **(changes or {})}), root / "base.yaml")
    plain: dict[str, Any] = {
        "name": "here", "budget": 1.5, "methods": ("fixed", "adamoe", "remoe"), "seeds": (1, 2, 3), "base": str(base),
        "overrides": {}, "root": root,
    }  # fmt: skip
    return Comparison(**{**plain, **other})


def record(arm: str, seed: int, loss: float, load: float = 1.5) -> dict[str, Any]:
    return {
        "arm": arm,
        "seed": seed,
        "code": {"commit": "c" * 40, "changed": False},
        "steps": 20,
        "tokens": 10,
        "flops": 3e7,
        "loss": {"all": loss},
        "accuracy": {"all": 0.25},
        "load": {"all": load, "by_input": {"text": load, "image": load}},
        "wire": {"rows_remote": 0.5},
    }


UNREACHABLE = {(0.5, "top_p"), (0.5, "top_k"), (1.5, "top_k")}


@pytest.mark.parametrize("budget", rest_full([1.5, 0.5, 2.0]))
def test_each_method_passes_the_rules_or_says_why_not(tiny_data: Path, tmp_path: Path, budget: float) -> None:
    for name in METHODS:
        one = asked(tmp_path, tiny_data, name=name, budget=budget, methods=(name, "remoe" if name == "fixed" else "fixed"))
        if (budget, name) in UNREACHABLE:
            with pytest.raises(ConfigError, match=name):
                make_study(one)
            continue
        study = make_study(one)
        for job in jobs_of(study):
            config = config_of(study, job)
            assert check(config, world_size=1).placement.groups[0].num_experts == 4
            assert config.even_active.get("all", budget) == pytest.approx(budget), (
                "its balance loss or controller aims at it"
            )


@pytest.mark.parametrize(
    ("changes", "other", "text"),
    [
        ({}, {"methods": ("fixed", "nothing")}, "--methods nothing: the methods are fixed, top_k, adamoe"),
        ({}, {"methods": ("fixed",)}, "a comparison needs two methods and two seeds at least"),
        ({}, {"seeds": (1, 1)}, "each named once"),
        ({}, {"methods": ("fixed", "top_k")}, "top_k: each token takes a whole number of experts, and 1.5 is none"),
        ({}, {"budget": 2.5}, "adamoe: 2.5 is above half of the 4 experts"),
        ({}, {"methods": ("fixed", "top_p"), "budget": 0.5}, "top_p: model.moe.balance.0.target.all=0.5"),
        ({}, {"methods": ("fixed", "single_null"), "budget": 1.1}, "single_null: 1.1 needs"),
        ({"model.moe.groups": {"all": {**GROUP, "num_null": 2}}}, {}, "methods cannot be compared: model.moe.groups.all"),
        ({"model.moe.router": {"kind": "relu"}}, {}, "methods cannot be compared: model.moe.router"),
        ({"loss.balance.kind": "weighted"}, {}, "methods cannot be compared: loss.balance.kind"),
        ({}, {"ranks": (1, 3)}, "--ranks 3: fixed: train.global_batch"),
        ({"model.mixture_of_depths": {}}, {}, "methods cannot be compared: model.mixture_of_depths"),
    ],
    ids=str,
)
def test_what_cannot_be_compared_is_refused(
    tiny_data: Path, tmp_path: Path, changes: dict[str, Any], other: dict[str, Any], text: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        make_study(asked(tmp_path, tiny_data, changes, **other))
    assert text in str(raised.value)
    assert not (tmp_path / "here" / "here.jsonl.gz").exists()


def test_ranks_share_the_overridden_batch(tiny_data: Path, tmp_path: Path) -> None:
    make_study(asked(tmp_path, tiny_data, overrides={"train.global_batch": 6, "train.micro_batch": 6}, ranks=(1, 2)))


def test_nothing_is_overwritten_and_no_run_joins_those_of_another_base(tiny_data: Path, tmp_path: Path) -> None:
    study = make_study(asked(tmp_path, tiny_data))
    before = (tmp_path / "here" / "study.yaml").read_bytes()
    with pytest.raises(ConfigError, match="another comparison"):
        make_study(asked(tmp_path, tiny_data, budget=1.0))
    assert (tmp_path / "here" / "study.yaml").read_bytes() == before
    header = {"fingerprint": fingerprint(tmp_path / "here" / "study.yaml", study)}
    for pilot in (False, True):
        path = results_path(study, pilot=pilot)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(gzip.compress(json.dumps(header).encode()))
        make_study(asked(tmp_path, tiny_data))
        with pytest.raises(ConfigError, match="has changed since the finished runs"):
            make_study(asked(tmp_path, tiny_data, {"optimizer.lr": 0.5}))
        path.unlink()


def test_each_method_gets_the_rate_with_its_lowest_pilot_loss(tiny_data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--rates: leave it out, or give data with more held-out documents"):
        make_search(asked(tmp_path, tiny_data, rates=(1e-3, 0.01), name="few"))
    with pytest.raises(ConfigError, match="--hold: leave it out, or give data with more held-out documents"):
        make_study(asked(tmp_path, tiny_data, hold=True, name="few-held"))
    tiny_dataset(tmp_path / "data", documents=DOCUMENTS)
    one = asked(tmp_path, tmp_path / "data", rates=(1e-3, 0.01))
    search = make_search(one)
    jobs = jobs_of(search, pilot=True)
    tried = {(job.label.split("~")[0], job.seed, job.settings["optimizer.lr"]) for job in jobs}
    assert tried == {(name, 103, rate) for name in one.methods for rate in one.rates}
    losses = {"fixed": (3.0, 2.0), "adamoe": (2.0, 2.5), "remoe": (2.0, 2.1)}
    labels = sorted({job.label for job in jobs})  # NAME~lr0.001 and NAME~lr0.01 for each method
    records = {(label, 103): record(label, 103, losses[label.split("~")[0]][label.endswith("0.01")]) for label in labels}
    rates = best_rates(one, records)
    assert rates == {"fixed": 0.01, "adamoe": 1e-3, "remoe": 1e-3}
    study = make_study(one, rates)
    assert {job.label: config_of(study, job).optimizer.lr for job in jobs_of(study)} == rates
    text = write_comparison(one, study, {("fixed", seed): record("fixed", seed, 3.0) for seed in (1, 2)})
    assert "| `fixed` | fixed number, the fraction by a random draw | 0.01 | 2 |" in text
    assert "| 3.00 | 0.51 |" in text, "half a row x 2 layers x 32 numbers x 4 bytes x 4 exchanges, as no ranks are timed"
    path = results_path(search, pilot=True)
    assert path.is_relative_to(tmp_path), "comparisons of other folders share no search"
    del records[labels[0], 103]
    with pytest.raises(ConfigError, match="no finished search for adamoe; run the command without --report"):
        best_rates(one, records)


@pytest.mark.parametrize("text", ["1e-3", "1e-3,1e-3", "0,1e-3", "-1,1e-3", "nan,1e-3", "inf,1e-3", "1e-3,fast"])
def test_rates_that_cannot_be_compared_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^--rates"):
        _rates(text)


def test_a_control_has_the_loads_of_its_method_and_its_rate(tiny_data: Path, tmp_path: Path) -> None:
    one = asked(tmp_path, tiny_data, controls=True)
    study = make_study(one, {"fixed": 0.1, "adamoe": 0.01, "remoe": 0.02})
    controls = {job.label: config_of(study, job) for job in jobs_of(study) if job.label.endswith(SUFFIX)}
    assert {name: config.optimizer.lr for name, config in controls.items()} == {"adamoe_loads": 0.01, "remoe_loads": 0.02}
    for name, config in controls.items():
        arm = study.arms[name]
        assert arm.needs == (name.removesuffix(SUFFIX),)
        assert study.arms[arm.needs[0]].asks == ("load_tables",)
        assert config.model.moe.router.kind == "top_k_by_id"
        assert config.model.moe.groups["all"].top_k == 4, "a modality may take all experts"
    records = {
        (arm, seed): record(arm, seed, loss + seed, load)
        for arm, loss, load in (("fixed", 3.0, 1.5), ("adamoe", 2.9, 1.5), ("adamoe_loads", 2.8, 1.5), ("remoe", 3.1, 1.6))
        for seed in (1, 2, 3)
    }
    text = write_comparison(one, study, records)
    heads, _, *rows = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if line.startswith("|")]
    assert [row[1] for row in rows] == ["`fixed`", "`adamoe`", "`remoe`"], "controls have no row of their own"
    place = heads.index("less its loads by modality")
    assert [row[place] for row in rows] == ["-", "+0.1000 [+0.1000, +0.1000]", "-"]
    assert ["(off budget)" in "".join(row) for row in rows] == [False, False, True]
    assert first_jobs(study).keys() == {"fixed", "adamoe", "remoe"}, "steps of controls are not timed"


def test_controls_need_text_and_image(tiny_data: Path) -> None:
    manifest = load_manifest(tiny_data)
    check_modalities(manifest)
    (part,) = manifest.modalities["text"]
    with pytest.raises(ConfigError, match="--controls: loads are taken by text and image, and the data have text; leave"):
        check_modalities(manifest.model_copy(update={"modalities": {"text": (part,)}}))


def test_the_default_base_has_what_the_methods_need() -> None:
    base = load_config("research/configs/compare/base.yaml")
    assert find_file("configs/compare/base.yaml").is_file()
    for method in METHODS.values():
        assert json.loads(json.dumps(method.settings(base, 1.5)))
