"""Runs `moe-dist plan`, and tests its table, picture, configuration and sentences, and its errors for bad input."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

import tools.plan
import tools.report
from moe_dist.config.load import load_config
from moe_dist.monitor.report.numbers import traffic
from moe_dist.placement.placement import ExpertPlacement
from moe_dist.plan.estimate import LayoutEstimator
from moe_dist.plan.layouts import Placements, layouts
from moe_dist.plan.policies import expert_groups
from moe_dist.plan.rates import Rates, published_rates, rates_text, read_rates
from moe_dist.plan.rows import Expected
from tests.support.cover import full
from tests.support.invoked import invoke
from tests.unit.monitor.report.conftest import draw_routing
from tests.unit.plan.test_step_model import RATES

CONFIG, SMALL = "adamoe_moma_tiny_cpu", ["train.global_batch=16", "parallel.device=auto"]
# With few sequences per GPU there are few sizes of micro-batches. Estimating a layout takes 10 ms.
FOUR = ["train.global_batch=4", "train.micro_batch=1", "parallel.device=auto"]
ONE_EXPERT = [f"model.moe.groups.{group}.num_experts=1" for group in ("text", "image")]


def plan(folder: Path, *arguments: str, overrides: list[str] = SMALL) -> tuple[int, str]:
    given = [CONFIG, *overrides, "--out", str(folder / "plan.yaml"), *arguments]
    done = invoke(tools.plan.main, *given)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.output


@pytest.mark.parametrize(("gpus", "command"), [full("4", "moe-dist launch local "), ("16", "moe-dist launch slurm ")])
def test_the_last_line_says_how_to_start(tmp_path: Path, gpus: str, command: str) -> None:
    code, said = plan(tmp_path, "--gpus", gpus, overrides=[*SMALL, *ONE_EXPERT])
    assert code == 0
    assert f"start it with {command}" in " ".join(said.split())


@pytest.mark.slow
def test_a_plan_without_a_trace(tmp_path: Path) -> None:
    code, said = plan(tmp_path, "--gpus", "2..4", "--price", "2", overrides=FOUR)
    assert code == 0, said
    count, fit = map(int, re.findall(r"(\d+) layouts, (\d+) fit", said)[0])
    assert count > 300
    assert fit == count
    assert "Time: extrapolated" in said
    assert "expectations of the configuration" in said
    assert re.findall(r"^│ +(\d+) │ ep", said, re.MULTILINE) == ["2", "4"]
    best = load_config(tmp_path / "plan.yaml")
    assert best.parallel.ep * best.parallel.edp in (2, 4)
    assert best.model == load_config(CONFIG).model
    assert re.search(r"EP \d stays in the node: \d+% of its step is exchange", said)
    assert re.search(r"pinned, with ranks for this mix, .* image share", said)
    drawn = (tmp_path / "plan.svg").read_text()
    assert drawn.count("extrapolated</text>") == 2
    assert "waiting for the busiest rank" in drawn


def test_numbers_of_gpus_that_are_left_out_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(CONFIG, SMALL)
    planner, placements = LayoutEstimator(RATES, Expected({}), {}, 1e12), Placements(config, {})
    every = [planner.estimate(*next(layouts(config, count, RATES, placements))) for count in (1, 2, 4)]
    odd, full = tools.plan.left_out(config, [1, 2, 3, 4], every, every[2:])
    assert odd.startswith(
        "3 GPUs are left out, because train.global_batch=16 is not a multiple of them; take train.global_"
    )
    assert re.fullmatch(
        r"1, 2 GPUs are left out, because no layout fits; on 2 the nearest, ep 1 .*, needs [\d.]+ GB\.", full
    )
    assert not list(tools.plan.left_out(config, [4], every, every))
    monkeypatch.setattr(tools.plan, "problems_of", lambda each: ["parallel.ep=1: not here; take another"])
    code, said = plan(tmp_path, "--gpus", "1", overrides=FOUR)
    assert code == 78
    assert re.search(
        r"layouts fit into memory, but each breaks a rule; the nearest is ep .*not here", said.replace("\n", " ")
    )


@pytest.mark.slow
def test_a_plan_from_a_trace_of_real_routing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(CONFIG)

    def hot(preference_LC: np.ndarray, group: int) -> None:
        preference_LC[2, 5] += 4 if group == 0 else 0

    routing = draw_routing(expert_groups(config.model.moe), layers=4, tokens=1200, steps=1, bias=hot)
    routing = replace(routing, layers=config.model.moe_layers)
    monkeypatch.setattr(tools.report, "open_routing", lambda path, option: routing)
    code, said = plan(tmp_path, "--gpus", "4", "--trace", "made", "--memory", "20", overrides=FOUR)
    assert code == 0, said
    assert "fitted, from the trace" in said
    assert "explicit" in said  # the placement that fits the measured loads
    assert re.search(r"expert text/5 of layer 2 alone makes [\d.]+% of the busiest ranks' expert work", said)
    replayed = re.findall(r"^│ +(\d) │ (\w+) +│(.*)│$", said, re.MULTILINE)
    rows = {(ep, policy): rest.split("│") for ep, policy, rest in replayed}
    assert {ep for ep, _ in rows} == {"1", "2", "4"}
    tokens = routing.tokens
    placement = ExpertPlacement.interleaved(routing.groups, 4)
    sent = traffic(tokens.ids_TLK, tokens.sequence_T, placement, (8,), micro_batch=1)
    assert float(rows["4", "interleaved"][0]) == pytest.approx(sent.rows / 1200 / 4, abs=1e-3)
    assert float(rows["4", "explicit"][5]) < float(rows["4", "interleaved"][5]), "the solver's busiest rank has less"
    other = replace(routing, layers=(0, 1))
    monkeypatch.setattr(tools.report, "open_routing", lambda path, option: other)
    code, said = plan(tmp_path, "--gpus", "4", "--trace", "made")
    assert code == 78
    assert re.search(r"--trace made: it has 2 MoE layers .*, but default has 4 MoE layers .*; give a trace of this", said)


def write_rates(folder: Path, rates: Rates) -> str:
    path = folder / "rates.yaml"
    path.write_text(rates_text(rates))
    return str(path)


def test_measured_rates_are_read_for_their_machine_alone(tmp_path: Path) -> None:
    path = write_rates(tmp_path, RATES)
    assert read_rates(Path(path)) == RATES
    code, said = plan(tmp_path, "--gpus", "2", "--rates", path, "--machine", "test", overrides=FOUR)
    assert code == 0, said
    assert "rates of test (test: measured)" in said
    code, said = plan(tmp_path, "--gpus", "2", "--rates", path, "--machine", "other")
    assert code == 78
    assert "machine=test, but this is other; measure here with moe-dist calibrate, or give --machine test" in said
    values = yaml.safe_load(Path(path).read_text()) | {"launch": -1.0, "inside": []}
    del values["copy_rate"]
    Path(path).write_text(yaml.safe_dump(values))
    code, said = plan(tmp_path, "--gpus", "2", "--rates", path)
    assert code == 78
    assert all(key in said for key in ("launch", "copy_rate"))


@pytest.mark.parametrize(
    ("arguments", "overrides", "words"),
    [
        (["--gpus", "8..2"], SMALL, "--gpus 8..2: the range is empty"),
        (["--gpus", "8.5"], SMALL, "--gpus 8.5: write a number or a range"),
        (["--gpus", "12"], SMALL, r"train.global_batch=16 must be a multiple .*--gpus 8, or train.global_batch=24"),
        (
            ["--gpus", "2", "--memory", "0.5"],
            FOUR,
            r"--memory 0.5: no layout of \d+ keeps .* nearest needs [\d.]+ GB on 2 GPUs: ep ",
        ),
        (["--out", "plan.json"], SMALL, "--out plan.json: the name must end with .yaml"),
        (["--cluster", "cpu"], SMALL, "gpus.type=None: the plan needs the card"),
        (["--gpus", "8", "--cluster", "{site}"], SMALL, r"between_gbytes=null: 8 GPUs are more than the 4 of a node"),
        (["--rates", "nowhere.yaml"], SMALL, "--rates nowhere.yaml: cannot be read"),
    ],
)
def test_bad_input_is_refused(tmp_path: Path, arguments: list[str], overrides: list[str], words: str) -> None:
    site = tmp_path / "site.yaml"
    site.write_text("gpus: {type: h100, per_node: 4}\n")
    code, said = plan(tmp_path, *(each.format(site=site) for each in arguments), overrides=overrides)
    assert code == 78
    assert re.search(words, said.replace("\n", " ")), said


def test_published_rates() -> None:
    rates = published_rates("h100", 989e12, ranks_per_node=8, between=45e9)
    assert rates.source == "extrapolated"
    assert rates.gemm.at(1e5) == pytest.approx(0.71 * 989e12)
    assert rates.gemm.at(1.0) == pytest.approx(rates.copy_rate)  # memory-bound: 2 FLOPs per weight of 2 bytes
    with pytest.raises(Exception, match="abacus: no published rates"):
        published_rates("abacus", None, ranks_per_node=8, between=None)
