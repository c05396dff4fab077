"""Names the new module when a user runs `python -m` with the name that the module had in an earlier version."""

import sys

RENAMED = {
    "launchers.slurm_job": "launchers.slurm.job",
    "launchers.slurm_step": "launchers.slurm.step",
    "tools.bench_dispatch": "research.bench",
    "tools.bench_router_tuning": "research.bench.router_tuning",
    "research.experiments.conventions": "research.experiments.convention_data",
    "tools.reproduce": "research.experiments",
    "tools.reproduction": "research.experiments",
}


class RenamedFinder:
    """A module finder that Python asks last, if no file has the name. Raises an error that names the new module."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        if name in RENAMED:
            raise ModuleNotFoundError(f"{name} is now {RENAMED[name]}", name=name)


def name_renamed_modules() -> None:
    """Installs the finder. The packages `launchers` and `tools` call this function when they are imported."""
    if RenamedFinder not in sys.meta_path:  # `launchers` or `tools` may have installed the finder
        sys.meta_path.append(RenamedFinder)
