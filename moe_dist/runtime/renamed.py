"""Modules of before that were run by `python -m`, with their names of today."""

import sys

RENAMED = {
    "launchers.slurm_job": "launchers.slurm.job",
    "tools.bench_dispatch": "tools.bench",
    "tools.bench_router_tuning": "tools.bench.router_tuning",
    "tools.experiments.conventions": "tools.experiments.convention_data",
    "tools.reproduce": "tools.experiments",
    "tools.reproduction": "tools.experiments",
}


class RenamedFinder:
    """Asked last, when no file has the name: an old module ends with the new name."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        if name in RENAMED:
            raise ModuleNotFoundError(f"{name} is now {RENAMED[name]}", name=name)


def name_renamed_modules() -> None:
    """Packages that had such modules call this."""
    if RenamedFinder not in sys.meta_path:
        sys.meta_path.append(RenamedFinder)
