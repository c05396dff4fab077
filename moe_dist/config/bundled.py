"""Finds the files and folders that belong to moe_dist, in the clone or in the installed package."""

import difflib
import os
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from moe_dist import __version__

VERSION = __version__  # version of moe_dist; other modules import it from here
NEAR = 0.75  # smallest similarity (difflib's ratio) at which an error text proposes a name


def source_root() -> Path:
    """Returns the folder that contains launchers/, tools/, configs/ and slurm/. In a clone, this is the clone's root. An
    installed package has copies of the four folders in its folder `bundled`."""
    package = Path(str(files("moe_dist")))
    bundled = package / "bundled"
    return bundled if bundled.is_dir() else package.parent


def add_to_path(folder: Path) -> None:
    """Puts a folder on the module search path of this process and its child processes. They can then import the packages in
    the folder, and configurations can choose the kinds that these packages offer (`base/kinds.py`)."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
        paths = filter(None, [str(folder), os.environ.get("PYTHONPATH")])
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)


def find_config(path: str | Path) -> Path:
    """Finds the configuration file `path` in the current folder, in `source_root()` or in `source_root()`/configs.
    `path` may omit the ending .yaml. Returns `path` itself if no file is found."""
    given, root = Path(path), source_root()
    names = (given, given.with_name(f"{given.name}.yaml") if given.name else given)
    candidates = [folder / name for folder in (Path(), root, root / "configs") for name in names]
    # For a forbidden or too long path, os.path.isfile returns False, but Path.is_file raises. Reading raises later.
    return next((candidate for candidate in candidates if os.path.isfile(candidate)), given)


def hint_for_missing(path: Path) -> str:
    """Returns the end of an error text. It proposes the files or bundled names that are similar to `path`; if none is
    similar, it lists all bundled names."""
    beside = {other.stem: str(other) for other in path.parent.glob("*.yaml") if other != path}
    bundled = sorted(other.stem for other in (source_root() / "configs").glob("*.yaml"))
    near = [beside[stem] for stem in difflib.get_close_matches(path.stem, beside, 1, NEAR)]
    near = near or difflib.get_close_matches(path.stem, bundled, 3, NEAR) or _with_its_words(path.stem, bundled)
    return f"did you mean {' or '.join(near)}?" if near else f"configs/ has {', '.join(bundled)}"


def _with_its_words(stem: str, names: Sequence[str]) -> list[str]:
    """Returns the names that begin with `stem` or have all its words, in descending order of similarity."""
    words = set(stem.split("_"))
    found = [name for name in names if len(stem) > 2 and (name.startswith(stem) or words <= set(name.split("_")))]
    return sorted(found, key=lambda name: -difflib.SequenceMatcher(None, stem, name).ratio())
