"""Dense models of transformers get experts: LLaVA-MoLE's adapters and MoMa's copies of FFNs. N ranks train as one does."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_dist.hf.code_checks import verify_export
from moe_dist.inference.loaded_run import find_trained
from moe_dist.placement.parameter_names import ADAPTERS, Role
from moe_dist.train.start.resume import Progress
from tests.distributed.test_hosted import LAYOUTS, ONE, initial_difference, steps
from tests.support.dense import MODELS, PICTURED, PINNED, mole
from tests.support.engine_run import built_run, take_steps
from tests.support.hosted import hosted_config
from tests.support.invoked import invoke
from tests.support.tiny import IMAGE_IDS
from tests.support.worlds import RankContext
from tools import export_hf

OWN = {Role.ZERO_COMPUTATION, Role.DEPTH_ROUTER, Role.AUXILIARY_ROUTER}  # only models of this project have these
TRAINED = {"train.only": "adapters", "optimizer.lr": 0.01}


def layout(name: str, kind: str) -> dict[str, Any]:
    changes = {"pinned": PINNED, "fsdp2": LAYOUTS["ep2, fsdp2, recompute=experts"]}.get(name) or LAYOUTS[name]
    return {**changes, **(TRAINED if kind == "mole" else {})}


@pytest.mark.parametrize(
    ("kind", "layout_name"),
    [("moma", "pinned"), ("moma", "fsdp2"), ("copies", "uneven"), ("mole", "uneven"), ("mole", "fsdp2")],
)
@pytest.mark.slow
def test_n_ranks_equal_one(
    run_in_world: Callable[..., list[Any]], tiny_data: Path, tmp_path: Path, kind: str, layout_name: str
) -> None:
    model = MODELS[kind](tmp_path / "dense")
    changes = layout(layout_name, kind)
    one_changes = {**ONE, **(TRAINED if kind == "mole" else {})}
    world = changes["parallel.ep"] * changes.get("parallel.edp", 1)
    ((one, ready),) = run_in_world(1, steps, str(tiny_data), str(tmp_path / "1"), model, one_changes)
    results = run_in_world(world, steps, str(tiny_data), str(tmp_path / "n"), model, changes)
    for reports, also in results:
        assert also == ready == (True, False)
        for found, expected in zip(reports, one, strict=True):
            for key in ("loss", "norm", "balance", "z"):
                assert float(found[key]) == pytest.approx(float(expected[key]), rel=1e-9), key
            assert found["choices"].tolist() == expected["choices"].tolist()
    assert any(reports[-1]["rows"]["rows_remote"] > 0 for reports, _ in results)


def begun(
    rank: RankContext, data: str, root: str, model: Mapping[str, Any], changes: Mapping[str, Any]
) -> tuple[float, set[Role]]:
    """Starts a run from a dense folder, takes two steps and saves. Returns the largest difference between the run's initial
    losses and those of transformers' dense model, and the roles of the weights that changed."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    torch.set_num_threads(1)
    with built_run(hosted_config(data, root, model, changes), world_size=rank.world_size) as run:
        saver = run.saver()
        saver.restore()
        family = run.config.model.family
        auto: Any = AutoModelForImageTextToText if family in PICTURED else AutoModelForCausalLM
        own = auto.from_pretrained(model["folder"], dtype=torch.float32).eval()
        if family == "chameleon":  # transformers forbids picture tokens in the output, which this engine trains
            own.model.vocabulary_mapping.__dict__["image_tokens"] = []
        difference = initial_difference(run, own)
        before = [each.parameter.detach().clone() for each in run.training.parallel.parameters]
        take_steps(run, 0, 2)
        saver.save(Progress(step=2, position=2 * run.config.train.global_batch), durable=True)
        both = zip(run.training.parallel.parameters, before, strict=True)
        return difference, {now.role for now, old in both if bool((now.parameter != old).any())}


@pytest.mark.parametrize(
    ("kind", "layout_name"), [("moma", "pinned"), ("copies", "fsdp2"), ("mole", "uneven"), ("mole", "fsdp2")]
)
@pytest.mark.slow
def test_a_run_begins_as_the_dense_model(
    run_in_world: Callable[..., list[Any]], tiny_data: Path, tmp_path: Path, kind: str, layout_name: str
) -> None:
    model, changes = MODELS[kind](tmp_path / "dense"), layout(layout_name, kind)
    world = changes["parallel.ep"] * changes.get("parallel.edp", 1)
    trained = {Role.ROUTER, Role.EXPERT_ADAPTER} if kind == "mole" else {*Role} - ADAPTERS - OWN
    for difference, changed in run_in_world(world, begun, str(tiny_data), str(tmp_path), model, changes):
        assert difference < 2e-6
        assert changed == trained


def losses_of(rank: RankContext, data: str, root: str, model: Mapping[str, Any], changes: Mapping[str, Any]) -> float:
    """Returns the largest difference between the initial losses of a run on an export, and the losses of that export with
    its own code."""
    torch.set_num_threads(1)
    with built_run(hosted_config(data, root, model, changes), world_size=rank.world_size) as run:
        run.saver().restore()
        return initial_difference(run, exported_model(Path(model["folder"])))


def exported_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True).eval()


@pytest.mark.slow
def test_more_experts_begin_as_copies_of_an_export(
    run_in_world: Callable[..., list[Any]], tiny_data: Path, tmp_path: Path
) -> None:
    """MoMa's two stages. A run with one expert of text and one of pictures is exported as a folder with code. The trained
    model has the export's losses in a run of as many experts, and in a run of three and five."""
    first = MODELS["moma"](tmp_path / "dense", 1, 1)
    run_in_world(2, begun, str(tiny_data), str(tmp_path), first, {"parallel.ep": 2})
    out = tmp_path / "out"
    assert invoke(export_hf.main, tmp_path / "tiny", "--out", out).exit_code == 0
    assert verify_export(out) == []
    equal = {"folder": str(out), "moe": {"groups": {}}}
    more = {"folder": str(out), "moe": {"groups": {"text": {"num_experts": 3}, "image": {"num_experts": 5}}}}
    for model, changes in ((equal, ONE), (more, PINNED)):
        ranks = changes["parallel.ep"]
        for difference in run_in_world(ranks, losses_of, str(tiny_data), str(tmp_path / str(ranks)), model, changes):
            assert difference < 2e-6


@pytest.mark.slow
def test_an_export_has_the_trained_experts(run_in_world: Callable[..., list[Any]], tiny_data: Path, tmp_path: Path) -> None:
    """The export of three and five trained experts has the losses of the run."""
    run_in_world(2, begun, str(tiny_data), str(tmp_path), MODELS["moma"](tmp_path / "dense"), {"parallel.ep": 2})
    assert invoke(export_hf.main, tmp_path / "tiny", "--out", tmp_path / "out").exit_code == 0
    again = {"folder": str(tmp_path / "out"), "moe": {"groups": {}}}
    (difference,) = run_in_world(1, losses_of, str(tiny_data), str(tmp_path / "1"), again, ONE)
    assert difference < 2e-6
    run = find_trained(tmp_path / "tiny")
    model: Any = run.load(torch.device("cpu"))
    trained = model.family.state_dict()
    exported = exported_model(tmp_path / "out")
    found = exported.family.state_dict()
    assert found.keys() == trained.keys()
    assert all(torch.equal(found[name], trained[name]) for name in trained)
    ids_1S, groups = torch.arange(64)[None], torch.tensor(run.group_of_modality)
    group_of_id_V = groups[(torch.arange(64) >= IMAGE_IDS[0]).long()]
    with torch.no_grad(), model.generating(group_of_id_V) as family:  # each token goes to the experts of its id's group
        torch.testing.assert_close(family(input_ids=ids_1S).logits, exported(ids_1S).logits)


@pytest.mark.slow
def test_lora_experts_are_exported(run_in_world: Callable[..., list[Any]], tiny_data: Path, tmp_path: Path) -> None:
    """A single LoRA expert is merged into the family's own form. PEFT loads each of several, and the result has the merged
    matrices."""
    import peft
    from transformers import AutoModelForCausalLM

    with_adapters: Any = peft.PeftModel.from_pretrained

    def trained(name: str, num_experts: int) -> tuple[Path, Any]:
        model = mole(tmp_path / name / "dense", num_experts)
        run_in_world(1, begun, str(tiny_data), str(tmp_path / name), model, {**ONE, **TRAINED})
        return tmp_path / name / "tiny", find_trained(tmp_path / name / "tiny").load(torch.device("cpu"))

    run, model = trained("one", 1)
    assert invoke(export_hf.main, run, "--out", tmp_path / "merged").exit_code == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    ids_1S = torch.arange(20)[None]
    places_1S, zeros_1S = torch.arange(20)[None], torch.zeros(1, 20, dtype=torch.int64)
    with torch.no_grad():
        expected_1SV, _ = model.eval()(ids_1S, places_1S, zeros_1S, zeros_1S)
        torch.testing.assert_close(merged(input_ids=ids_1S).logits, expected_1SV, rtol=1e-5, atol=1e-6)

    run, model = trained("several", 3)
    refused = invoke(export_hf.main, run, "--out", tmp_path / "several.out")
    assert refused.exit_code == 78
    assert "--adapters" in refused.output
    assert invoke(export_hf.main, run, "--adapters", "--out", tmp_path / "adapters").exit_code == 0
    block = "model.layers.1.mlp"
    experts = model.family.get_submodule(f"{block}.experts.experts")
    for expert in range(3):
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "several/dense", dtype=torch.float32)
        weight = base.get_parameter(f"{block}.up_proj.weight").detach().clone()
        adapted = with_adapters(base, tmp_path / "adapters/experts" / f"expert_{expert}")
        delta = experts.up_proj_lora_B[expert] @ experts.up_proj_lora_A[expert] * 2.0  # alpha / rank
        assert delta.any()
        found = adapted.merge_and_unload().get_submodule(f"{block}.up_proj").weight
        torch.testing.assert_close(found, weight + delta)
