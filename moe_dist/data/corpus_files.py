"""Makes sources from a user's files: folders or JSONL files of texts, folders of pictures, JSONL files of instructions."""

from pathlib import Path
from typing import Any

from moe_dist.config.regular_file import IrregularFileError, read_regular
from moe_dist.data.corpus import Instruction, Picture, Skip, Source, Text, content_family, refuse
from moe_dist.data.tables import holds_table, lines, parsed_row, raw_rows
from moe_dist.errors import ConfigError, DataError

MOST_BYTES = 1 << 28  # largest size of a text or picture
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg")
TEXT_ROW = '{"text": "..."}'
INSTRUCTION_ROW = '{"prompt": "...", "answer": "..."}'
_CONVERT = "; convert the file, or move it elsewhere"
INSTRUCTION_KEYS = ("prompt", "answer", "image", "family", "side")


def text_files(name: str, path: Path, licence: str, skip: Skip = refuse) -> Source[Text]:
    """Reads texts from all UTF-8 files under a folder, or from a table that `raw_rows` reads, such as a JSONL file. A row
    is an object with a "text".

    Skips pictures, captions (a .txt beside a picture of the same name), and files whose name begins with a dot. Each file
    or row is a document. Equal documents are one family.

    Raises:
        ConfigError: `path` does not exist or contains no text.
        DataError: a row has no "text", or `skip` raises for a file that is not UTF-8.
    """
    unread: list[str] = []

    def noted(error: DataError) -> None:
        skip(error)
        unread.append(str(error).removesuffix(_CONVERT))

    if path.exists() and (path.is_file() or holds_table(path)):
        found = [(where.rpartition(" ")[2], row_text(row, where)) for where, row in raw_rows("text", path)]
    elif path.is_dir():
        found = [(str(file.relative_to(path)), _utf8(file, noted)) for file in _visible(path, skip) if _may_be_text(file)]
    else:
        raise ConfigError(f"text {str(path)!r}: no such file or folder")
    texts = tuple(Text(key, content_family(text.encode()), text) for key, text in found if text.strip())
    if not texts:
        convert = f"{unread[0]}; convert it (`iconv -f LATIN1 -t UTF-8 old.txt > new.txt`), or " if unread else ""
        raise ConfigError(f"text {str(path)!r}: holds no UTF-8 text; {convert}name another folder")
    return Source(name, texts, licence)


def picture_files(name: str, folder: Path, licence: str, skip: Skip = refuse) -> Source[Picture]:
    """Reads PNG and JPEG files under a folder. A .txt file of the same name is the caption. Equal pictures are a family.

    Raises:
        ConfigError: the folder does not exist or contains no picture.
        DataError: `skip` raises for a caption that is not UTF-8.
    """
    if not folder.is_dir():
        raise ConfigError(f"images {str(folder)!r}: no such folder")
    pictures = []
    files = _visible(folder, skip)
    for path in files:
        if path.suffix.lower() in PICTURE_SUFFIXES:
            beside = path.with_suffix(".txt")
            caption = _utf8(beside, skip).strip() if beside in files else ""
            family = content_family(_picture_bytes(path))
            pictures.append(Picture(str(path.relative_to(folder)), family, path, (caption,) if caption else ()))
    if not pictures:
        raise ConfigError(f"images {str(folder)!r}: holds no {', '.join(PICTURE_SUFFIXES)} file")
    return Source(name, tuple(pictures), licence)


def instruction_files(name: str, path: Path, licence: str) -> Source[Instruction]:
    """Reads instructions from a JSONL file, one object per line. The keys `prompt` and `answer` are required. The optional
    key `image` is the path of a PNG or JPEG file, relative to the JSONL file's folder and inside this folder. Lines with
    equal `family` (by default, with equal prompt and image) stay on one side of the split. The optional `side` is train or
    valid; all lines or none must have it.

    Raises:
        ConfigError: the file does not exist or is empty.
        DataError: a line is not a valid instruction.
    """
    if not path.is_file():
        raise ConfigError(f"--instructions {name}={path}: no such file; it takes a JSONL file (docs/data.md)")
    found = [_instruction(path, where, parsed_row(line, where, INSTRUCTION_ROW)) for where, line in lines(path)]
    if not found:
        raise ConfigError(f"--instructions {name}={path}: holds no line")
    sides = {each.side for each in found}
    if "" in sides and len(sides) > 1:
        raise DataError(f'{path}: some lines have a "side" and some have none; give one to each line, or to none')
    if sides == {"valid"}:
        raise DataError(f'{path}: every line has "side": "valid", so nothing is left to train on; give some lines "train"')
    return Source(name, tuple(found), licence)


def _instruction(path: Path, where: str, line: dict[str, Any]) -> Instruction:
    if unknown := sorted(set(line) - set(INSTRUCTION_KEYS)):
        raise DataError(f"{where}: unknown key {', '.join(unknown)}; an instruction has {', '.join(INSTRUCTION_KEYS)}")
    for key in INSTRUCTION_KEYS:
        if key in line and not isinstance(line[key], str):
            raise DataError(f'{where}: "{key}" is {type(line[key]).__name__}, not a string')
    for key in ("prompt", "answer"):
        if not line.get(key, "").strip():
            raise DataError(f'{where}: needs a "{key}" that is not empty')
    side = line.get("side", "")
    if side not in ("", "train", "valid"):
        raise DataError(f'{where}: "side" is {side!r}; it is train or valid, or left out')
    image = path.parent / line["image"] if "image" in line else None
    if image is not None and not image.is_file():
        raise DataError(f'{where}: "image" names {str(image)!r}, which is no file')
    if image is not None and not (
        image.suffix.lower() in PICTURE_SUFFIXES and image.resolve().is_relative_to(path.parent.resolve())
    ):
        raise DataError(
            f'{where}: "image" names {str(image)!r}; it must be a {", ".join(PICTURE_SUFFIXES)} file in the folder of '
            f"{path.name} or below; move or convert the picture"
        )
    shown = b"" if image is None else _picture_bytes(image)
    family = line.get("family") or content_family(line["prompt"].encode() + b"\0" + shown)
    return Instruction(family, line["prompt"], line["answer"], image, side)


def _visible(folder: Path, skip: Skip) -> dict[Path, None]:
    """Returns the files under a folder in order, without those whose name begins with a dot. Skips links to files outside
    of the folder, because whoever gave the folder may not be allowed to read them."""
    found: dict[Path, None] = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        if path.resolve().is_relative_to(folder.resolve()):
            found[path] = None
        else:
            skip(DataError(f"{path}: is a link to a file outside of {folder}; copy it there, or remove the link"))
    return found


def _may_be_text(path: Path) -> bool:
    if path.suffix.lower() in PICTURE_SUFFIXES:
        return False
    return path.suffix != ".txt" or not any(path.with_suffix(suffix).is_file() for suffix in PICTURE_SUFFIXES)


def _utf8(path: Path, skip: Skip) -> str:
    try:
        return read_regular(path, most_bytes=MOST_BYTES).decode()
    except IrregularFileError as error:
        skip(DataError(f"{path}: {error.strerror}; split the file, or move it elsewhere"))
    except UnicodeDecodeError as error:
        skip(DataError(f"{path}: not UTF-8 at byte {error.start:,}{_CONVERT}"))
    return ""


def _picture_bytes(path: Path) -> bytes:
    try:
        return read_regular(path, most_bytes=MOST_BYTES)
    except IrregularFileError as error:
        raise DataError(f"picture {str(path)!r} {error.strerror}; replace or remove it") from error


def row_text(row: bytes | dict[str, Any], where: str) -> str:
    """Returns the text of a row that `raw_rows` yields. Raises DataError if the row is not like TEXT_ROW."""
    row = parsed_row(row, where, TEXT_ROW)
    if "text" not in row:
        raise DataError(f"{where}: needs an object like {TEXT_ROW}")
    if not isinstance(row["text"], str):
        raise DataError(f'{where}: "text" is {type(row["text"]).__name__}, not a string')
    return row["text"]
