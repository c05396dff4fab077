"""A user's own files: a folder or JSONL of texts, a folder of pictures."""

import json
from pathlib import Path

from moe_dist.data.corpus import Picture, PictureSource, Text, TextSource, content_family
from moe_dist.errors import ConfigError, DataError

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg")


def text_files(name: str, path: Path, licence: str) -> TextSource:
    """Texts of a JSONL file (one object with a "text" a line), or of all UTF-8 files under a folder (others are skipped).

    Files and folders that begin with a dot are left out, and so are captions (a .txt with a picture of the same name
    beside it). A document is a file, or a line of the JSONL; equal ones are one family.

    Raises:
        ConfigError: there is nothing at `path`, or no text in it.
        DataError: a line of the JSONL is not such an object.
    """
    if path.is_file():
        found = list(_json_lines(path))
    elif path.is_dir():
        found = [(str(file.relative_to(path)), _utf8(file)) for file in _visible(path) if not _is_caption(file)]
    else:
        raise ConfigError(f"text {str(path)!r}: no such file or folder")
    texts = tuple(Text(key, content_family(text.encode()), text) for key, text in found if text.strip())
    if not texts:
        raise ConfigError(f"text {str(path)!r}: holds no UTF-8 text")
    return TextSource(name, texts, licence)


def picture_files(name: str, folder: Path, licence: str) -> PictureSource:
    """PNG and JPEG files under a folder; a .txt of the same name beside one is its caption. Equal files are one family.

    Raises:
        ConfigError: there is no such folder, or no picture in it.
    """
    if not folder.is_dir():
        raise ConfigError(f"images {str(folder)!r}: no such folder")
    pictures = []
    for path in _visible(folder):
        if path.suffix.lower() in PICTURE_SUFFIXES:
            beside = path.with_suffix(".txt")
            caption = _utf8(beside).strip() if beside.is_file() else ""
            family = content_family(path.read_bytes())
            pictures.append(Picture(str(path.relative_to(folder)), family, path, (caption,) if caption else ()))
    if not pictures:
        raise ConfigError(f"images {str(folder)!r}: holds no {', '.join(PICTURE_SUFFIXES)} file")
    return PictureSource(name, tuple(pictures), licence)


def _visible(folder: Path) -> list[Path]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def _is_caption(path: Path) -> bool:
    return path.suffix == ".txt" and any(path.with_suffix(suffix).is_file() for suffix in PICTURE_SUFFIXES)


def _utf8(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError:
        return ""


def _json_lines(path: Path) -> list[tuple[str, str]]:
    found = []
    with path.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f'{path}, line {number}: needs an object like {{"text": "..."}}') from error
            if not isinstance(text, str):
                raise DataError(f'{path}, line {number}: "text" is {type(text).__name__}, not a string')
            found.append((str(number), text))
    return found
