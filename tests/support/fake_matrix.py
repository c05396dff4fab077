"""Options on fake CUDA tensors: a cover of all pairs of values, on a tiny model of eight ranks.

`python -m tests.support.fake_matrix NUMBER`, in a process that `tools.fake_gpu.fake_cuda.child` started, prints lines of
JSON: for each pair that preflight refuses, the pair and the problems; then for each of the first NUMBER cases its
`options`, and what `tests.support.fake_run.observed` found on the last rank, or an `error`. "first rank" has the
collectives of the first rank's first step.
"""

import json
import random
import sys
import tempfile
import traceback
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from moe_dist.config.load import load_config
from moe_dist.config.yaml_text import dump_yaml
from moe_dist.errors import ConfigError
from moe_dist.plan.preflight import layout_without_data
from moe_dist.train.router_tuning.loader import SampleBatch
from tests.support.fake_run import observed
from tests.support.tuning_samples import made_samples
from tools.fake_gpu import fake_cuda, fake_step

RANKS, VOCABULARY = 8, 512
GROUP = {"num_experts": 4, "num_null": 4, "top_k": 2, "ffn_dim": 32}
BASE: dict[str, Any] = {
    "run": {"name": "pairs"},
    "model": {
        "hidden_dim": 64,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "vocab_size": VOCABULARY,
        "max_seq_len": 32,
        "moe": {
            "groups": {"text": {**GROUP, "modalities": ["text"]}, "image": {**GROUP, "modalities": ["image"]}},
            "router": {"kind": "top_k", "normalise": "none"},
        },
    },
    "data": {"path": "no data", "seq_len": 32},
    "train": {"steps": 2, "global_batch": 32, "micro_batch": 2},
    "optimizer": {"lr": 1e-3, "schedule": {"kind": "constant"}},
    "loss": {"balance": {"schedule": [[0, 0.0]]}},
    "parallel": {"ep": 4, "edp": 2, "device": "cuda", "precision": "bf16", "kernels": {"kind": "triton"}},
    "evaluation": {"every": 2, "balance_efficiency": False},
}
NO_NULLS = ["model.moe.groups.text.num_null=0", "model.moe.groups.image.num_null=0"]
STAGE = ["run.init_from=runs/first"]
FACTORS: dict[str, dict[str, list[str]]] = {  # keys that each value sets; the first value is the default
    "dispatch": {
        "all_to_all": [],
        "chunks": ["parallel.dispatch={kind: all_to_all, overlap: true, chunks: 2}"],
        "hierarchical": ["parallel.dispatch={kind: hierarchical, ranks_per_node: 2}"],
        "known_counts": ["parallel.dispatch.kind=known_counts"],
        "static": ["parallel.dispatch.kind=static"],
    },
    "router": {
        "top_k": [],
        "group_limited": ["model.moe.router={kind: group_limited, normalise: none}"],
        "top_p": ["model.moe.router.kind=top_p"],
        "thresholds": ["model.moe.router={kind: expert_choice, causal: threshold}", *NO_NULLS],
        "auxiliary": [
            "model.moe.router={kind: expert_choice, causal: auxiliary}",
            "train.only=auxiliary_routers",
            *NO_NULLS,
            *STAGE,
        ],
    },
    "recompute": {"none": [], "experts": ["parallel.recompute=experts"], "block": ["parallel.recompute=block"]},
    "data": {
        "ddp": [],
        "fsdp2": ["parallel.data=fsdp2"],
        "fsdp2, once a step": ["parallel.data=fsdp2", "parallel.fsdp_gather=step"],
    },
    "precision": {"bf16": [], "fp32": ["parallel.precision=fp32"]},
    "depths": {"none": [], "every second": ["model.mixture_of_depths={every: 2, causal: threshold}"]},
    "experts": {
        "ffn": [],
        "lora": [
            "model.moe.experts={kind: lora, rank: 4, alpha: 8.0}",
            "train.only=adapters",
            "run.init_rules=[adapt]",
            *STAGE,
        ],
    },
    "tuning": {"none": [], "routers": ["train.only=routers", "router_tuning={data: SAMPLES, last_layers: 1}", *STAGE]},
    "halves": {"no": [], "yes": ["parallel.two_batch_overlap=true"]},
    "kernels": {"triton": [], "torch": ["parallel.kernels.kind=torch"]},
    "optimizer": {"adamw": [], "muon": ["optimizer.kind=muon"]},
}
Case = dict[str, str]
Pair = tuple[tuple[str, str], tuple[str, str]]
VALUES = [(factor, value) for factor, values in FACTORS.items() for value in values]
DEFAULTS: Case = {factor: next(iter(values)) for factor, values in FACTORS.items()}


def pairs_of(case: Case) -> set[Pair]:
    """Returns each pair of the case's values, in the order of `FACTORS`."""
    return set(combinations(((factor, case[factor]) for factor in FACTORS if factor in case), 2))


class Cover:
    """Cases that contain each pair of values that preflight accepts, alone or with one further value.

    Attributes:
        cases: The cases.
        refused: The problems of each refused pair, with all other options at their defaults.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._problems, self._random = path, dict[tuple[str, ...], tuple[str, ...]](), random.Random(0)
        self.cases: list[Case] = []
        self.refused: dict[Pair, tuple[str, ...]] = {}
        missing = {pair for pair in combinations(VALUES, 2) if pair[0][0] != pair[1][0]}
        for pair in sorted(missing):
            if pair in missing:
                start = next((each for each in self._starts(pair) if not self.problems(each)), None)
                if start is None:
                    self.refused[pair] = self.problems(dict(pair))
                    missing.remove(pair)
                    continue
                case = self._filled(start, missing)
                self.cases.append(case)
                missing -= pairs_of(case)

    def problems(self, case: Case) -> tuple[str, ...]:
        """Returns preflight's reasons for refusing a case."""
        case = {**DEFAULTS, **case}
        key = tuple(case.values())
        if key not in self._problems:
            try:
                layout_without_data(load_config(self._path, overrides(case, self._path.parent)))
                self._problems[key] = ()
            except ConfigError as error:
                self._problems[key] = error.problems
        return self._problems[key]

    def _starts(self, pair: Pair) -> Iterator[Case]:
        """Yields the pair alone, and then with one further value, which it may need."""
        yield dict(pair)
        for value in VALUES:
            yield {**dict([value]), **dict(pair)}

    def _filled(self, case: Case, missing: set[Pair]) -> Case:
        """Gives each other factor the accepted value that adds most missing pairs."""
        factors = [factor for factor in FACTORS if factor not in case]
        self._random.shuffle(factors)
        for factor in factors:
            added = {value: len(pairs_of({**case, factor: value}) & missing) for value in FACTORS[factor]}
            order = sorted(added, key=lambda value: (-added[value], self._random.random()))
            case = next(each for value in order if not self.problems(each := {**case, factor: value}))
        return case


def overrides(case: Case, folder: Path) -> list[str]:
    changes = [change for factor, value in case.items() for change in FACTORS[factor][value]]
    return [change.replace("SAMPLES", str(folder / "samples")) for change in changes]


def run(case: Case, path: Path) -> dict[str, Any]:
    changes = overrides(case, path.parent)
    with fake_step.built(str(path), 0, RANKS, changes) as first, first.recorder:
        first.training.step(batches_of(first), lr=1e-4, aux=first.aux, number=0)
    with fake_step.built(str(path), RANKS - 1, RANKS, changes) as last:
        return {**observed(last, batches_of(last), held_out=1), "first rank": " ".join(first.recorder.order)}


def batches_of(run: fake_step.Built) -> list[Any]:
    batches = [fake_step.batch_of(run.config) for _ in range(fake_step.MICRO_BATCHES)]
    if run.training.tuning is None:
        return batches
    size = run.config.train.micro_batch
    probes = torch.zeros(size, dtype=torch.int64)
    return [SampleBatch(**vars(each), numbers=tuple(range(size)), probe_tokens_B=probes) for each in batches]


def main(number: int) -> None:
    fake_cuda.enter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pairs.yaml"
        path.write_text(dump_yaml(BASE))
        columns = 2 * (GROUP["num_experts"] + GROUP["num_null"])
        made_samples(Path(folder) / "samples", ids=(1, VOCABULARY), layers=(0, 1), columns=columns, model={})
        cover = Cover(path)
        for pair, problems in cover.refused.items():
            print(json.dumps({"pair": pair, "problems": problems}))
        for case in cover.cases[:number]:
            try:
                found = run(case, path)
            except Exception:  # the test reports all failing cases
                found = {"error": traceback.format_exc()[-2000:]}
            print(json.dumps({"options": case, **found}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
