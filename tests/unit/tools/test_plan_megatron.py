"""With engine.kind=megatron, `moe-dist plan` lists layouts that follow the engine's rules, with the numbers of the dry
run."""

import re
from pathlib import Path
from typing import Any

import pytest

import tools.plan
from moe_dist.config.load import load_config, rule_violations
from moe_dist.plan.flops import parameters
from moe_dist.train.start.dry_run import estimate
from tests.support.invoked import invoke

CONFIG = "adamoe_mixtral8x7b_64gpu_megatron"


def plan(folder: Path, *arguments: str) -> tuple[int, str]:
    done = invoke(tools.plan.main, CONFIG, "--out", str(folder / "plan.yaml"), *arguments)
    return done.exit_code, " ".join(done.output.split())


def test_the_first_layout_is_written_and_has_the_numbers_of_its_dry_run(tmp_path: Path) -> None:
    code, said = plan(tmp_path, "--gpus", "64", "--memory", "40")
    assert code == 0, said
    best = load_config(tmp_path / "plan.yaml")
    engine: Any = best.engine
    assert engine.tp == 1
    assert engine.pp > 1, "a stage alone has more than 40 GB of weights"
    assert not rule_violations(best)
    of_dry_run = estimate(best)
    (first,) = re.findall(r"│ (\d+) │ ep 8 x edp 8; tp 1[^│]* │ ([\d.]+)% │ ([\d.]+) G │ ([\d.]+) │ ([\d.]+) │", said)[:1]
    gpus, idle, held, memory, flops = map(float, first)
    assert gpus == best.parallel.ep * best.parallel.edp
    assert memory == pytest.approx(of_dry_run.rank_memory.total / 1e9, abs=0.05)
    tokens = best.train.global_batch * best.data.seq_len / gpus
    assert flops == pytest.approx(tokens * of_dry_run.training_flops[1] / 1e15, rel=0.01)
    times = best.train.global_batch / best.train.micro_batch / engine.data_ranks(best.parallel)
    assert idle == pytest.approx(100 * (engine.pp - 1) / (engine.vpp * times + engine.pp - 1), abs=0.05)
    # The fullest stage has the embedding or the output besides its share of the layers.
    share = parameters(best.model).total / best.parallel.ep / engine.pp
    assert share < held * 1e9 < 1.5 * share


def test_a_range_has_the_layouts_of_each_number_of_gpus(tmp_path: Path) -> None:
    code, said = plan(tmp_path, "--gpus", "16..32")
    assert code == 0, said
    gpus = [int(number) for number in re.findall(r"│ (\d+) │ ep ", said)]
    assert gpus == sorted(gpus)
    assert gpus[0] == 16
    first = load_config(tmp_path / "plan.yaml").parallel
    assert first.ep * first.edp == 16


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpus", "7"], r"--gpus 7: no degrees of engine.tp, engine.pp and engine.vpp keep the rules .*engine.cp=1"),
        (["--price", "2"], "--price: no step times are simulated for engine.kind=megatron"),
        (
            ["--gpus", "8", "--memory", "40"],
            r"--memory 40: none of \d+ layouts fits; the nearest needs [\d.]+ GB on 8 GPUs",
        ),
    ],
)
def test_what_no_layout_can_do_is_refused(tmp_path: Path, arguments: list[str], words: str) -> None:
    code, said = plan(tmp_path, *arguments)
    assert code == 78
    assert re.search(words, said), said
    assert not (tmp_path / "plan.yaml").exists()
