"""Reads the source files of the Python standard library on this machine."""

import os
import platform
import sysconfig
import tokenize
from pathlib import Path

from moe_dist.data.corpus import Source, Text, content_family
from moe_dist.errors import DataError

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
