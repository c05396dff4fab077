"""Where configurations, Slurm scripts, launchers and tools lie, and how a configuration is found by its name."""

import difflib
import os
from importlib.resources import files
from pathlib import Path


def source_root() -> Path:
    """The folder that holds launchers/, tools/, configs/ and slurm/: the clone, or `bundled` inside an installed
    package."""
    package = Path(str(files("moe_dist")))
    bundled = package / "bundled"
    return bundled if bundled.is_dir() else package.parent


def find_config(path: str | Path) -> Path:
    """The file that `path` names: itself or with .yaml, from the current folder, else bundled, also without `configs/`."""
    given, root = Path(path), source_root()
    names = (given, given.with_name(f"{given.name}.yaml") if given.name else given)
    candidates = [folder / name for folder in (Path(), root, root / "configs") for name in names]
    # Path.is_file raises where there is no permission or the name is too long; whoever reads the file reports that.
    return next((candidate for candidate in candidates if os.path.isfile(candidate)), given)


def hint_for_missing(path: Path) -> str:
    """The end of an error message: the file or bundled name that is most like `path`, else all bundled names."""
    beside = [str(other) for other in path.parent.glob("*.yaml")]
    bundled = sorted(other.stem for other in (source_root() / "configs").glob("*.yaml"))
    near = difflib.get_close_matches(str(path), beside, 1) or difflib.get_close_matches(path.stem, bundled, 3)
    return f"did you mean {' or '.join(near)}?" if near else f"the project brings {', '.join(bundled)}"
