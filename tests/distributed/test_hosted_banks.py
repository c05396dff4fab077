"""In a family with one bank of experts for text and one for pictures, N ranks equal one rank, and no rank hangs."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from moe_dist.comm.names import BACKWARD, DISPATCH_ROWS
from moe_dist.errors import DataError
from moe_dist.hf.host.weights import write_folder
from moe_dist.inference.loaded_run import find_trained
from moe_dist.placement.parameter_names import Role
from moe_dist.train.objective.loss import forward
from moe_dist.train.start.resume import Progress
from tests.support.banked import ERNIE, MODEL, joined, picture_batch
from tests.support.cover import full
from tests.support.engine_run import built_run
from tests.support.hosted import hosted_config
from tests.support.messages import refused
from tests.support.one_rank import world_of_one
from tests.support.worlds import RankContext

PINNED: dict[str, Any] = {
    "parallel.ep": 4,
    "placement": {"policy": "pinned", "groups": {"text_moe": {"ranks": [0, 1, 2]}, "vision_moe": {"ranks": [3]}}},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "pinned": PINNED,
    "pinned, recompute=block": {**PINNED, "parallel.recompute": "block"},
    "pinned, recompute=experts": {**PINNED, "parallel.recompute": "experts"},
    "interleaved, fsdp2": {"parallel.ep": 2, "parallel.edp": 2, "parallel.data": "fsdp2"},
}
SUBSETS = [tuple(bool(number >> rank & 1) for rank in range(4)) for number in range(16)]
LAYERS = 2  # layers with experts
# The family's routers always compute in fp32, so differences are as large as fp32's rounding.
LIMIT = 2e-5


def batches(subset: tuple[bool, ...], number: int) -> list[Any]:
    """Returns the batch of each of four ranks. Ranks with pictures differ in their number and sizes."""
    counts = [(1 + (rank + number) % 3, rank % 2) if with_picture else (0, 0) for rank, with_picture in enumerate(subset)]
    return [picture_batch(4 * number + rank, each, documents=2) for rank, each in enumerate(counts)]


def one_step(run: Any, batch: Any, number: int) -> dict[str, Any]:
    """Returns loss and gradients of a step that changes no weight, and how many exchanges dispatch made in each pass."""
    model, gradients = run.training.parallel.model, dict[str, Tensor]()
    slots = {bank.experts: bank.local(run.placement.slots[run.mesh.ep_rank]) for bank in model.banks}

    def keep(*_: Any) -> None:
        for each in run.training.parallel.parameters:
            grad = each.parameter.grad
            if grad is None:
                continue
            whole = (grad.full_tensor() if isinstance(grad, DTensor) else grad).clone()
            if each.role is not Role.EXPERT:
                gradients[each.name] = whole
                continue
            path = each.path.removeprefix("family.").rpartition(".")[0]
            gradients.update({f"{each.name}.{expert}": whole[at] for at, expert in enumerate(slots[path])})

    run.training.step._apply = keep
    stats = model.moe_modules()[0].dispatcher.exchange.all_to_all.comm_stats
    stats.events = []
    result = run.training.step([batch], lr=1e-3, aux=run.plan.aux(0), number=number)
    sent = [stats.events.count(name) for name in (DISPATCH_ROWS, DISPATCH_ROWS + BACKWARD)]
    return {
        "loss": float(result.nll_M.sum() / result.labels_M.sum()),
        "balance": float(result.balance),
        "choices": result.counts.choices_LC.tolist(),
        "exchanges": sent,
        "gradients": gradients,
    }


def steps(
    rank: RankContext, data: str, root: str, changes: Mapping[str, Any], subsets: list[tuple[bool, ...]]
) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    alone = rank.world_size == 1
    changes = {"train.micro_batch": 8 if alone else 2, **changes}
    with built_run(hosted_config(data, root, MODEL, changes), world_size=rank.world_size) as run:
        made = [batches(subset, number) for number, subset in enumerate(subsets)]
        each_step = [joined(each) if alone else each[rank.rank] for each in made]
        return [one_step(run, batch, number) for number, batch in enumerate(each_step)]


@pytest.mark.parametrize("layout", [name if name == "pinned" else full(name) for name in LAYOUTS])
@pytest.mark.slow
def test_n_ranks_equal_one(run_in_world: Callable[..., list[Any]], tiny_data: Path, tmp_path: Path, layout: str) -> None:
    """Each subset of the four ranks has pictures once. In each layer, a single exchange sends the tokens of both banks."""
    changes = LAYOUTS[layout]
    (one,) = run_in_world(1, steps, str(tiny_data), str(tmp_path / "1"), {"parallel.ep": 1}, SUBSETS)
    ranks = run_in_world(4, steps, str(tiny_data), str(tmp_path / "n"), changes, SUBSETS)
    again = LAYERS * (1 + (layout == "pinned, recompute=block"))
    for number, expected in enumerate(one):
        found = [each[number] for each in ranks]
        for each in found:
            assert each["exchanges"] == [again, LAYERS], SUBSETS[number]
            assert each["choices"] == expected["choices"]
            assert each["loss"] == pytest.approx(expected["loss"], rel=LIMIT)
            assert each["balance"] == pytest.approx(expected["balance"], rel=LIMIT)
        gradients = {name: grad for each in found for name, grad in each["gradients"].items()}
        assert gradients.keys() == expected["gradients"].keys()
        for each in found:
            for name, grad in each["gradients"].items():
                wanted = expected["gradients"][name]
                largest = max(float(wanted.abs().max()), 1e-6)
                assert float((grad - wanted).abs().max()) < LIMIT * largest, (SUBSETS[number], name)
        trained = {name: bool(grad.any()) for name, grad in gradients.items()}
        assert any(trained[name] for name in trained if "vision_moe.experts" in name) == any(SUBSETS[number])
        assert any(trained[name] for name in trained if "vision_tower" in name) == any(SUBSETS[number])


def from_folder(
    rank: RankContext, data: str, root: str, folder: str, changes: Mapping[str, Any]
) -> tuple[float, list[int]]:
    """Starts a run from a folder's weights, takes a step and saves. Returns the largest difference between the run's
    initial losses and transformers', and the number of this rank's experts in each bank."""
    from transformers import AutoModelForImageTextToText

    torch.set_num_threads(1)
    with built_run(
        hosted_config(data, root, {"folder": folder, "moe": {"groups": {}}}, changes), world_size=rank.world_size
    ) as run:
        saver, model = run.saver(), run.training.parallel.model
        saver.restore()
        own = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        batch: Any = picture_batch(rank.rank, (rank.rank, 1))
        model.eval()
        with torch.no_grad():
            losses_BS, _ = forward(model, batch, run.training.step.group_of_modality, losses=True)
            types_BS = (batch.tokens_BS == ERNIE["image_token_id"]).int()
            named = {"mm_token_type_ids": types_BS, "moe_mm_token_type_ids": batch.modality_BS, **batch.more}
            logits_BSV = own(input_ids=batch.tokens_BS, **named).logits
        expected_BS = F.cross_entropy(logits_BSV.transpose(1, 2), batch.labels_BS, reduction="none")
        model.train()
        run.training.step([batch], lr=1e-2, aux=run.plan.aux(0), number=0)
        saver.save(Progress(step=1, position=8), durable=True)
        held = [len(bank.local(run.placement.slots[run.mesh.ep_rank])) for bank in model.banks[:2]]
        return float((losses_BS - expected_BS).abs().max()), held


@pytest.mark.slow
def test_a_folder_is_read_trained_and_written(
    run_in_world: Callable[..., list[Any]], tiny_data: Path, tmp_path: Path
) -> None:
    """Pinned ranks start with the losses of transformers. transformers loads the trained weights from the export."""
    from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

    folder, out = tmp_path / "folder", tmp_path / "out"
    torch.manual_seed(0)
    before = AutoModelForImageTextToText.from_config(CONFIG_MAPPING[MODEL["family"]](**ERNIE))
    before.save_pretrained(folder)
    found = run_in_world(4, from_folder, str(tiny_data), str(tmp_path), str(folder), PINNED)
    assert all(difference < 2e-6 for difference, _ in found)
    assert [held for _, held in found] == [[2, 0], [1, 0], [1, 0], [0, 4]]
    model: Any = find_trained(tmp_path / "tiny").load(torch.device("cpu"))
    write_folder(model, out)
    trained = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32).state_dict()
    expected = model.family.state_dict()
    assert trained.keys() == expected.keys()
    assert all(torch.equal(trained[name], expected[name]) for name in expected)
    changed = {name for name, each in before.state_dict().items() if not torch.equal(each, trained[name])}
    assert {name for name in trained if ".experts." in name} <= changed


@pytest.mark.parametrize(("fault", "key"), [("modality", "moe_mm_token_type_ids"), ("pixels", "pixel_values")])
def test_a_batch_that_trains_no_vision_expert_is_refused(tiny_data: Path, tmp_path: Path, fault: str, key: str) -> None:
    with world_of_one(), built_run(hosted_config(tiny_data, tmp_path, MODEL, {"parallel.ep": 1})) as run:
        batch: Any = picture_batch(0, (1, 0))
        if fault == "modality":
            batch.modality_BS.zero_()
        else:
            batch.more.clear()
        with refused(DataError, key):
            forward(run.training.parallel.model, batch, run.training.step.group_of_modality, losses=True)
        if fault == "modality":  # the family's own token types are then used
            batch.more["moe_mm_token_type_ids"] = (batch.tokens_BS >= 48).int()
            forward(run.training.parallel.model, batch, run.training.step.group_of_modality, losses=True)
