"""Training steps of the GPU presets on fake CUDA tensors run only on the device, and the host waits only at the listed
reads.

Each preset has two layers, because all layers are alike, and two micro-batches. Each case takes 10 s of CPU time.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from moe_dist.errors import ResourceError
from moe_dist.train.start.dry_run import estimate
from research.fake_gpu.count import count
from research.fake_gpu.fake_cuda import child
from research.fake_gpu.fake_step import Counted, scaled
from tests.support.cover import exhaustive, full

READS_OF_A_STEP = 2  # at the step's end: this rank's counts, and all sums over the ranks
OF_A_STEP = ("step ledger.py:", "step training_step.py:")
SPLIT_SIZES = {"forward split sizes": 4}  # one for each of 2 layers in each of 2 micro-batches
IN_HALVES = {"forward split sizes": 8}
TOKENS = {"step tokens of each rank and group": 1}  # expert choice and dropout need this read
PRESETS: dict[str, dict[str, Any]] = {
    # `reads` has the named reads, and how often each occurs in a step. `kernels` bounds the kernels of an MoE layer in
    # forward and in backward (of each half, if a micro-batch is computed in halves).
    "adamoe_moma_small_1gpu": {"reads": SPLIT_SIZES, "kernels": (38, 54)},
    "olmoe_1b7b_8gpu": {"reads": IN_HALVES, "kernels": (30, 31)},
    "adamoe_mixtral8x7b_64gpu": {"reads": SPLIT_SIZES, "kernels": (31, 38)},
    "moma_1b4_4t4i_32gpu": {"reads": TOKENS, "kernels": (46, 35)},
    "mole_llama3_8b_8gpu": {"reads": {"forward LoRA pairs of each expert": 4, **TOKENS}, "kernels": (124, 172)},
}
FULL = [full("adamoe_moma_small_1gpu", 8), full("adamoe_mixtral8x7b_64gpu", 1024)]
MORE = [(preset, ranks) for preset in PRESETS for ranks in (8, 64, 1024)]
FULL += [exhaustive(*case) for case in MORE if full(*case) not in FULL]


@pytest.mark.parametrize(("preset", "ranks"), FULL)
def test_a_step_on_the_device(preset: str, ranks: int) -> None:
    expected = PRESETS[preset]
    overrides = ["model.num_layers=2", *(["parallel.ep=8"] if preset == "adamoe_moma_small_1gpu" else [])]
    counted = count(f"configs/{preset}.yaml", ranks, overrides, rank=ranks - 1)
    assert mixes_and_copies_nothing(counted)
    assert {name: counted.syncs[name] for name in expected["reads"]} == expected["reads"]
    others = {name: number for name, number in counted.syncs.items() if name not in expected["reads"]}
    assert list(others.values()) == [1] * READS_OF_A_STEP
    assert all(name.startswith(OF_A_STEP) for name in others)
    assert counted.tracked <= 1  # number of collectives that are still tracked, each with a CUDA event
    exchanges = preset != "mole_llama3_8b_8gpu"  # every rank has all LoRA experts, so there are no exchanges
    assert (counted.exchange_seconds > 0) == exchanges  # else waiting ranks look as busy as the slowest
    for phase, most in zip(("forward", "backward"), expected["kernels"], strict=True):
        runs = counted.layers["moe"] * (2 if expected["reads"] is IN_HALVES else 1)
        assert more_kernels(counted, "moe", phase) <= runs * most
    assert counted.kernels["step step"] <= 120


@pytest.mark.parametrize(
    ("preset", "ranks", "fields"),
    [
        full("moma_chameleon_7b_32gpu_transformers", 32, "model.fields.num_hidden_layers=2"),
        exhaustive(
            "mole_llava_7b_8gpu_transformers",
            8,
            "model.fields={text_config: {num_hidden_layers: 2}}",
        ),
    ],
)
def test_a_dense_family_with_experts_on_the_device(preset: str, ranks: int, fields: str) -> None:
    """Steps of models of transformers that got experts: nothing is copied, and the host reads sizes and pixels."""
    counted = count(f"configs/{preset}.yaml", ranks, [fields], rank=ranks - 1)
    assert not counted.mixed
    assert not counted.copies
    named = {name: number for name, number in counted.syncs.items() if not name.startswith(OF_A_STEP)}
    assert named.pop("forward split sizes") == 4
    assert all(name.startswith("forward pictures.py:") for name in named)


def more_kernels(counted: Counted, part: str, phase: str) -> int:
    """Returns the number of kernels that one more micro-batch adds."""
    return sum(number for *key, number in counted.more_work if key[:2] == [part, phase])


def mixes_and_copies_nothing(counted: Counted) -> bool:
    """Returns True if no operation mixes devices, nothing is copied between devices, and no backward of indexing sorts."""
    return not counted.mixed and not counted.copies and set(counted.sorted_sums) <= {"model"}


def observed(path: str, rank: int, ep: bool) -> dict[str, Any]:
    overrides = ["model.num_layers=2", *(["parallel.ep=8"] if ep else [])]
    done = child("research.tests.fake_gpu.fake_run", [path, str(rank), "8", *overrides])
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_without_a_compiler_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # has no library from an earlier build
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ResourceError, match=r"fake_cuda\.cpp by .*'no-such-compiler'.*install g\+\+ or set CXX"):
        count("configs/olmoe_1b7b_8gpu.yaml", 8)


@pytest.mark.full
def test_exchanges_of_fixed_sizes_need_no_read() -> None:
    """The forward and backward passes of all micro-batches read nothing from the device, because no shape depends on the
    routing."""
    options = ["model.num_layers=2", "parallel.dispatch.kind=static", "parallel.two_batch_overlap=false"]
    counted = count("configs/olmoe_1b7b_8gpu.yaml", 8, options, rank=7)
    assert list(counted.syncs.values()) == [1] * READS_OF_A_STEP
    assert all(name.startswith(OF_A_STEP) for name in counted.syncs)
    assert mixes_and_copies_nothing(counted)


IN_SAVE = {"storage": 1, "optimizer": 1, "state of the device's generator": 1}  # of copies, step count, generator
BALANCE_LOSS = {"losses": 2}  # a checkpoint has the counts of a balance loss that spans a whole step
EVALUATED = {"heldout": 4}  # counts and sums over ranks, with and without experts (MoMa: also with training's choice)
TIMED = {"balance": 36}  # 12 measured times, each with 3 reads: begin, end, and the slowest rank's time
SLOWEST = {"balance": 12}  # copies of this rank's measured times
RUNS: dict[str, tuple[dict[str, int], ...]] = {  # (reads of the last evaluation, reads of a save, copies of the evaluation)
    "adamoe_moma_small_1gpu": ({**EVALUATED, **TIMED, "split sizes": 56}, {**IN_SAVE, **BALANCE_LOSS}, SLOWEST),
    "olmoe_1b7b_8gpu": ({**EVALUATED, **TIMED, "split sizes": 56}, {**IN_SAVE, **BALANCE_LOSS}, SLOWEST),
    "adamoe_mixtral8x7b_64gpu": ({**EVALUATED, **TIMED, "split sizes": 56}, {**IN_SAVE, **BALANCE_LOSS}, SLOWEST),
    "moma_1b4_4t4i_32gpu": (
        {"heldout": 6, **TIMED, "split sizes": 64},
        IN_SAVE,
        {**SLOWEST, "planning": 3},  # tables of dispatch plans, which only MoMa's evaluation needs
    ),
    "mole_llama3_8b_8gpu": ({"heldout": 2, "LoRA pairs of each expert": 4}, {**IN_SAVE, **BALANCE_LOSS}, {}),
}


@pytest.mark.parametrize(
    "preset", [(full if preset.startswith("adamoe_mixtral") else exhaustive)(preset) for preset in RUNS]
)
def test_evaluation_and_save_on_the_device(preset: str) -> None:
    """Copies to the host are queued, and the host waits once for all of them. A second save allocates no memory."""
    evaluated, saved, copies = RUNS[preset]
    found = observed(f"configs/{preset}.yaml", 7, preset == "adamoe_moma_small_1gpu")
    assert not any(found[phase]["mixed"] for phase in found.keys() - {"snapshot"})
    assert not found["step"]["copies"]
    assert found["evaluation"]["reads"] == evaluated
    assert found["evaluation"]["copies"] == copies
    assert found["save"]["reads"] == found["first save"]["reads"] == saved
    assert not found["save"]["copies"]
    assert not found["save"]["order"]
    kept = found["snapshot"]
    assert kept["on host"]
    assert kept["same memory"]
    assert 0 <= kept["copies"] - kept["tensors"] <= 2


@pytest.mark.full
def test_parameters_gathered_once_per_step() -> None:
    """The experts' ranks are on different nodes, so each gather and each sum of gradients crosses the network."""
    options = ["model.num_layers=2", "parallel.recompute=none", "parallel.two_batch_overlap=false"]
    found = {}
    for gather in ("micro_batch", "step"):
        counted = count("configs/adamoe_mixtral8x7b_64gpu.yaml", 64, [*options, f"parallel.fsdp_gather={gather}"])
        found[gather] = Counter[str]()
        for name, number in counted.collectives.items():
            found[gather][name.split()[2]] += number
        again = {sent[2] for sent in counted.more_sent} & {"_allgather_base_", "_reduce_scatter_base_"}
        assert bool(again) == (gather == "micro_batch"), "what FSDP2 copies around them would be copied again, too"
    layers, meshes = 2, 2  # an MoE layer shards its experts over edp, and all other parameters over all ranks
    units = 1 + layers * (1 + meshes)
    assert found["step"]["_allgather_base_"] == found["step"]["_reduce_scatter_base_"] == units
    assert found["micro_batch"]["_reduce_scatter_base_"] == 2 * units
    assert found["micro_batch"]["_allgather_base_"] == 2 * (2 * units - 1)  # the root keeps its parameters until backward


@pytest.mark.full
@pytest.mark.parametrize(
    ("preset", "ranks", "more"),
    [
        ("olmoe_1b7b_8gpu", 8, []),
        exhaustive("olmoe_1b7b_8gpu", 8, ["parallel.two_batch_overlap=false", "train.micro_batch=1"]),
        exhaustive("adamoe_mixtral8x7b_64gpu", 64, []),
        exhaustive("adamoe_mixtral8x7b_64gpu", 64, ["parallel.recompute=none"]),
        exhaustive("moma_1b4_4t4i_32gpu", 32, []),
    ],
)
def test_the_dry_run_knows_the_memory_within_a_tenth(preset: str, ranks: int, more: list[str]) -> None:
    """Compares estimated and counted memory of two more layers, because layers take nearly all of a preset's memory."""
    found = []
    for layers in (2, 4):
        path, overrides = f"configs/{preset}.yaml", [f"model.num_layers={layers}", *more]
        done = child("research.tests.fake_gpu.fake_memory", [path, "0", str(ranks), *overrides])
        assert done.returncode == 0, done.stderr[-2000:]
        found.append((int(done.stdout.split()[-1]), estimate(scaled(overrides, path, ranks)).rank_memory.total))
    measured, estimated = (large - small for small, large in zip(*found, strict=True))
    assert 0.9 * measured <= estimated <= 1.1 * measured, (measured / 2**30, estimated / 2**30)
