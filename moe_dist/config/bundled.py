"""Finds configuration files and packages, in the clone or in the installed package."""

import difflib
import os
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from moe_dist import __version__

VERSION = __version__  # version of this package; other modules import it from this file
NEAR = 0.75  # least similarity (difflib's ratio) of a name that an error text proposes


def source_root() -> Path:
    """Returns the folder that contains launchers/, tools/, configs/ and slurm/. In a clone, the folder is the clone itself.
    An installed package has copies of these folders in its folder `bundled`."""
    package = Path(str(files("moe_dist")))
    bundled = package / "bundled"
    return bundled if bundled.is_dir() else package.parent


def add_to_path(folder: Path) -> None:
    """Puts a folder on the search path of this process and of its child processes. The folder's packages can then be
    imported, and the kinds that its packages offer can be configured (`base/kinds.py`)."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
        paths = filter(None, [str(folder), os.environ.get("PYTHONPATH")])
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)


def find_config(path: str | Path) -> Path:
    """Finds the configuration file `path`, whose .yaml may be omitted, in the current folder, in `source_root()` or in its
    subfolder configs/. Returns `path` itself if there is no such file."""
    given, root = Path(path), source_root()
    names = (given, given.with_name(f"{given.name}.yaml") if given.name else given)
    candidates = [folder / name for folder in (Path(), root, root / "configs") for name in names]
    # Unlike Path.is_file, os.path.isfile returns False without permission or for a too long name. The later read raises.
    return next((candidate for candidate in candidates if os.path.isfile(candidate)), given)


def hint_for_missing(path: Path) -> str:
    """Returns the end of an error text, with the files or bundled names similar to `path`, else all bundled names."""
    beside = {other.stem: str(other) for other in path.parent.glob("*.yaml") if other != path}
    bundled = sorted(other.stem for other in (source_root() / "configs").glob("*.yaml"))
    near = [beside[stem] for stem in difflib.get_close_matches(path.stem, beside, 1, NEAR)]
    near = near or difflib.get_close_matches(path.stem, bundled, 3, NEAR) or _with_its_words(path.stem, bundled)
    return f"did you mean {' or '.join(near)}?" if near else f"configs/ has {', '.join(bundled)}"


def _with_its_words(stem: str, names: Sequence[str]) -> list[str]:
    """Returns the names that begin with `stem`, or have all its words; the most similar name comes first."""
    words = set(stem.split("_"))
    found = [name for name in names if len(stem) > 2 and (name.startswith(stem) or words <= set(name.split("_")))]
    return sorted(found, key=lambda name: -difflib.SequenceMatcher(None, stem, name).ratio())
