"""Searches for the best learning rate of each method of a comparison.

Each method has one pilot run with each learning rate. All pilot runs have the same seed, which no other run has. A method
gets the rate of its pilot run with the lowest loss on validation sequences, which no other run uses.
"""

from moe_dist.errors import ConfigError
from research.experiments.comparison import Comparison, study_values, write_study
from research.experiments.study import VARIANT, Study
from research.experiments.verdicts import Records, of_arm

FILE = "rates.yaml"


def make_search(asked: Comparison) -> Study:
    """Writes the study whose pilot runs are the search, and returns the study.

    Raises:
        ConfigError: see `make_study`.
    """
    values = study_values(asked)
    variants = {_variant(rate): {"optimizer.lr": rate} for rate in asked.rates}
    values["name"] = f"{asked.name}-rates"
    values["pilot"]["variants"] = {name: dict(variants) for name in asked.methods}
    return write_study(asked, asked.folder / FILE, values)


def best_rates(asked: Comparison, records: Records) -> dict[str, float]:
    """Returns the best learning rate of each method.

    Raises:
        ConfigError: a pilot run is missing.
    """
    losses = {
        name: {
            rate: record["loss"]["all"]
            for rate in asked.rates
            for record in of_arm(records, f"{name}{VARIANT}{_variant(rate)}").values()
        }
        for name in asked.methods
    }
    if missing := [name for name, found in losses.items() if len(found) < len(asked.rates)]:
        raise ConfigError(f"--rates: no finished search for {', '.join(missing)}; run the command without --report")
    return {name: min(found, key=found.__getitem__) for name, found in losses.items()}


def _variant(rate: float) -> str:
    return f"lr{rate:g}"
