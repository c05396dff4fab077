"""The cases of `plan.yaml`: each fault on each of its engines, and each healthy run."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

HERE = Path(__file__).parent
STEPS = 120
ENGINES = ("moe_dist", "transformers", "megatron")


@dataclass(frozen=True)
class Case:
    """A run of the plan.

    Attributes:
        fault: Name of the fault; empty for a healthy run.
        cause: Patterns that a statement must all have; empty for a healthy run.
        effect: Step from which the fault changes the training.
        set: Keys over those of the file `bases/<base>.yaml`.
        ranks: Number of data-parallel ranks, unless `set` has other ones.
        resume: Whether the run is stopped at step 60 and goes on.
        before: Base whose finished run gives the first weights.
        load: Number of other processes that compute.
        data: `overlap` for the small data set that is its own held-out set.
    """

    key: str
    what: str
    base: str
    fault: str = ""
    cause: tuple[str, ...] = ()
    effect: int = 1
    set: dict[str, Any] = field(default_factory=dict)
    ranks: int = 1
    resume: bool = False
    before: str = ""
    load: int = 0
    data: str = ""

    def overrides(self, out: Path) -> list[str]:
        """Returns the overrides of the run in the folder `out`."""
        keys = {"run.name": self.key, "run.root": str(out / "runs"), **self.set}
        if self.ranks > 1 and "parallel.ep" not in self.set:
            keys["parallel.edp"] = self.ranks
        if self.before:
            keys["run.init_from"] = str(out / "runs" / f"before-{self.before}")
        if self.data:
            keys["data.path"] = str(overlapping_data(out))
        return [f"{key}={json.dumps(value) if not isinstance(value, str) else value}" for key, value in keys.items()]


def cases() -> list[Case]:
    """Returns all cases: the faults of this project's engine, the healthy runs, then the other engines."""
    plan = yaml.safe_load((HERE / "plan.yaml").read_text())
    by_engine: dict[str, list[Case]] = {}
    for fault in plan["faults"]:
        engines, name, patterns = fault.pop("engines"), fault.pop("id"), tuple(fault.pop("cause"))
        base = fault.pop("base", "")
        for engine in engines:
            # Other engines take only the steps in which the fault must be named: the own engine has shown the rest.
            more = {"set": {**fault.get("set", {}), "train.steps": fault["effect"] + 69}} if engine != "moe_dist" else {}
            case = Case(f"{name}-{engine}", base=base or engine, fault=name, cause=patterns, **{**fault, **more})
            by_engine.setdefault(engine, []).append(case)
    healthy = [Case(f"healthy-{each.pop('id')}", base=each.pop("base", "moe_dist"), **each) for each in plan["healthy"]]
    return [*by_engine["moe_dist"], *healthy, *by_engine["transformers"], *by_engine["megatron"]]


def overlapping_data(out: Path) -> Path:
    """Writes a data set of some 40 sequences, whose held-out split is its training split. Returns its folder."""
    from moe_dist.data.indexed import IndexedSplit, write_indexed
    from moe_dist.formats.manifest import Manifest

    source, folder = Path(".cache/data/openmoji"), out / "overlap"
    if folder.exists():
        return folder
    part = folder.with_suffix(".part")
    part.mkdir(parents=True, exist_ok=True)
    fields = json.loads((source / "manifest.json").read_text())
    manifest = Manifest.model_validate_json((source / "manifest.json").read_text())
    for name in ("tokenizer.json", "codebook.npy"):
        (part / name).write_bytes((source / name).read_bytes())
    for name, count, most in (("openmoji", 20, 128), ("python", 5, 512)):
        split = IndexedSplit(source, manifest.sources[name].train)
        lengths = np.minimum(split.lengths_D[:count], most).tolist()
        documents = [split.tokens(int(start), length) for start, length in zip(split.starts_D, lengths, strict=False)]
        write_indexed(part / f"{name}_train", documents, vocab_size=manifest.vocab_size)
        ids = np.concatenate(documents)
        counts = {
            key: int(sum(((ids >= a) & (ids < b)).sum() for a, b in ranges)) for key, ranges in manifest.modalities.items()
        }
        section = {"path": f"{name}_train", "documents": count, "tokens": len(ids), "tokens_by_modality": counts}
        fields["sources"][name] |= {"train": section, "valid": section}
    (part / "manifest.json").write_text(json.dumps(fields))
    part.rename(folder)
    return folder
