"""Compares a run's held-out loss with the held-out loss of a run with fixed top-k. Its figures are in
configs/fixed_top_k.json."""

import json
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from moe_dist.config.bundled import source_root
from moe_dist.config.load import difference
from moe_dist.config.schema import Config
from moe_dist.errors import MoeDistError
from moe_dist.formats.manifest import Manifest
from moe_dist.formats.split_files import data_digest
from moe_dist.monitor.statistics import EvaluationResult

FIGURES = source_root() / "configs" / "fixed_top_k.json"
# Keys whose values may differ between this run and the run with fixed top-k. The comparison shows the effect of null
# experts, k and normalisation. The other keys listed here do not change the loss.
MAY_DIFFER = (
    *("run.name", "run.root", "run.group", "data.path", "placement.*", "checkpoint.*", "monitor.*", "evaluation.checks"),
    *("model.moe.groups.*.num_null", "model.moe.groups.*.top_k", "model.moe.router.normalise"),
)


def beside_fixed_top_k(config: Config, manifest: Manifest, evaluation: EvaluationResult, *, figures: Path = FIGURES) -> str:
    """Returns a sentence that compares this run with the run with fixed top-k: held-out losses (nats per token) and numbers
    of true experts per token, by modality. Returns "" if there are no figures for this model, data, steps and seed. Also
    returns "" if figures or data cannot be read, so that a finished run does not fail."""
    try:
        for known in json.loads(figures.read_text(encoding="utf-8")):
            if _same_but_nulls(known, config) and data_digest(config.data.path, manifest) == known["data"]:
                losses = _pairs(evaluation.loss, known["held_out"], ".3f")
                experts = _pairs(evaluation.experts_per_token, known["experts_per_token"], ".2f")
                return (
                    f"held-out loss of this run / of {known['name']} (same data, steps and seed, no null experts): "
                    f"{losses} nats; true experts a token: {experts}"
                )
    except (MoeDistError, OSError, ValueError, KeyError):
        pass
    return ""


def _same_but_nulls(known: Mapping[str, Any], config: Config) -> bool:
    changes = difference(Config.model_validate_json(json.dumps(known["config"])), config)
    return all(any(fnmatchcase(change.key, allowed) for allowed in MAY_DIFFER) for change in changes)


def _pairs(ours: Mapping[str, float], theirs: Mapping[str, float], form: str) -> str:
    return ", ".join(f"{name} {ours[name]:{form}} / {number:{form}}" for name, number in theirs.items())
