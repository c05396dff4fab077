"""In training on conversations with pictures, N ranks equal one rank, with dealt sequences, and after a resume on another
number of ranks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_dist.data.corpus import Recipe
from moe_dist.data.prepare import Inputs, prepare
from moe_dist.train.start.resume import Progress
from tests.support.cover import full
from tests.support.engine_run import built_run
from tests.support.hosted import hosted_config
from tests.support.picture_chats import picture_folder, rows
from tests.support.worlds import RankContext

MOLE = {
    "experts": {"kind": "sharded_lora", "rank": 2, "alpha": 4.0, "weight": "straight_through"},
    "groups": {"experts": {"num_experts": 4, "modalities": ["text", "image"]}},
}
BATCH, LIMIT = 4, 2e-5  # sequences per step; largest difference, because routers compute in fp32


def losses(rank: RankContext, root: str, until: int, changes: dict[str, Any]) -> list[tuple[float, float, list[Any]]]:
    """Starts or restores a run, and trains to step `until`. Returns loss, gradient norm and choices of each step."""
    torch.set_num_threads(1)
    size, home = rank.world_size, Path(root)
    share = {"parallel.ep": size, "train.micro_batch": BATCH // size, "train.global_batch": BATCH}
    data = {"path": str(home / "data"), "seq_len": 192, "most_patches": 300}
    model = {"folder": str(home / "model"), "moe": MOLE if changes.get("train.only") else {"groups": {}}}
    config = hosted_config(home / "data", home / "runs", model, {**share, "data": data, **changes})
    with built_run(config, world_size=size) as run:
        saver, found, moved = run.saver(), [], False
        progress = saver.restore()
        for step in range(progress.step, until):
            batches = run.loader.batches(step * BATCH)
            assert any(each.family_inputs() for each in batches) or size > 1
            moved |= (
                "rank_balance" in changes and run.loader.dealt(step * BATCH).dealt < run.loader.dealt(step * BATCH).undealt
            )
            result = run.training.step(batches, lr=1e-3, aux=run.plan.aux(step), number=step)
            loss = float(result.nll_M.sum() / result.labels_M.sum())
            found.append((loss, float(result.grad_norm), result.counts.choices_LC.tolist()))
        assert moved == ("rank_balance" in changes), "dealing moves no sequence"
        saver.save(Progress(step=until, position=until * BATCH), durable=True)
        return found


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "llava", full("ernie4_5_vl_moe"), full("glm4v_moe")])
@pytest.mark.slow
def test_ranks_equal_one_and_resume(run_in_world: Callable[..., list[Any]], tmp_path: Path, family: str) -> None:
    picture_folder(tmp_path / "model", family)
    file, _ = rows(tmp_path / "rows", 40)
    prepare(tmp_path / "data", Inputs(messages=str(file)), Recipe(tokenizer=str(tmp_path / "model")), lambda *_: None)
    of_one = {"run": {"name": "one", "root": str(tmp_path / "runs"), "seed": 0}}
    trained = {"train.only": "adapters"} if family == "llava" else {}  # LLaVA-MoLE
    (one,) = run_in_world(1, losses, str(tmp_path), 4, {**of_one, **trained})
    two = run_in_world(2, losses, str(tmp_path), 3, {"rank_balance": {"dealing": True}, **trained})
    then = run_in_world(4, losses, str(tmp_path), 4, trained)
    assert all(each == two[0] for each in two)
    assert all(each == then[0] for each in then)
    assert len(then[0]) == 1
    sharded = {"parallel.ep": 2, "parallel.edp": 2, "parallel.data": "fsdp2", "run": {"name": "cut", "seed": 0}, **trained}
    sharded["run"]["root"] = str(tmp_path / "runs")
    cut = run_in_world(4, losses, str(tmp_path), 1, sharded)  # FSDP2 cuts the stacks of experts that the folder gives
    assert (cut[0][0][0], cut[0][0][2]) == (pytest.approx(one[0][0], rel=LIMIT), one[0][2])
    for (loss, norm, choices), (wanted, wanted_norm, wanted_choices) in zip([*two[0], *then[0]], one, strict=True):
        assert choices == wanted_choices
        assert loss == pytest.approx(wanted, rel=LIMIT)
        assert norm == pytest.approx(wanted_norm, rel=1e-4)
