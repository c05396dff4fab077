"""Prepares a data set folder atomically, with one writer at a time.

The folder is built under a hidden name beside its final path, and renamed when it is complete. A lock file makes other
writers wait. The next writer removes the hidden folder of an interrupted writer.
"""

import errno
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import TypeAdapter, ValidationError

from moe_dist.config.base.section import Name
from moe_dist.config.json_text import read_json
from moe_dist.data.chat_turns import Turns
from moe_dist.data.corpus import Corpus, Recipe, Skip, refuse
from moe_dist.errors import ConfigError, DataError, StorageError
from moe_dist.formats.manifest import MANIFEST_FILE, Manifest, load_manifest
from moe_dist.runtime.progress import Report

# Error numbers for lack of disk space or failed I/O. Some packages raise write errors without a number (None).
DISK = (None, errno.ENOSPC, errno.EDQUOT, errno.EIO)
RECIPE_FILE = "recipe.json"


@dataclass(frozen=True)
class Inputs:
    """The sources of a data set. Without text, images and instructions, the default corpus is built."""

    text: str | None = None  # folder or JSONL file of the user's texts
    images: str | None = None  # folder of the user's pictures
    extra_text: Mapping[str, str] = field(default_factory=dict)  # more text sources by name, each a folder or JSONL
    licence: str = "not stated"  # licence of the user's own texts, pictures and instructions
    instructions: Mapping[str, str] = field(default_factory=dict)  # sources of instructions by name, each a JSONL file
    messages: str | None = None  # JSONL file, parquet file or datasets folder of conversations
    languages: tuple[str, ...] = ()  # languages of the default corpus's captions; empty for all languages


def prepare(out: Path, inputs: Inputs, recipe: Recipe, report: Report, skip: Skip = refuse) -> tuple[Manifest, bool]:
    """Builds the data set in folder `out`. If the data set exists already, it is only checked, which takes a second.

    Args:
        skip: Function called for each unreadable file. If it returns, the file is left out, and recipe.json says why.

    Returns:
        The manifest, and whether this call built it.

    Raises:
        ConfigError: `out` contains other files or a data set with other options; or an input is missing.
        DataError: an input, or the finished data set, is damaged.
        StorageError: a file cannot be read or written.
    """
    try:
        return _prepare(out, inputs, recipe, report, skip)
    except OSError as error:
        if error.errno in DISK:
            fix = f"{error.strerror or error}; nothing was made: free or mend that disk, or choose another folder"
        else:
            fix = f"{error}; nothing was made: mend this, or choose another folder"
        raise StorageError(f"--out {out}: {fix}") from error


def _prepare(out: Path, inputs: Inputs, recipe: Recipe, report: Report, skip: Skip) -> tuple[Manifest, bool]:
    out = out.resolve()  # if `out` is a link, the rename must replace the link's target
    asked = _as_json(inputs, recipe)
    if done := _finished(out, asked, skip):
        return done, False
    out.parent.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=out.parent).close()  # fails at once without write access; the lock would wait forever
    lock = FileLock(out.parent / f".{out.name}.lock")
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        report("wait for another writer", 0, 1)
        held = lock.acquire()
    with held:
        if done := _finished(out, asked, skip):
            return done, False
        skipped: list[str] = []

        def noted(error: DataError) -> None:
            skip(error)
            skipped.append(str(error))

        is_folder = recipe.tokenizer is not None and Path(recipe.tokenizer).is_dir()
        build = _build_chat if is_folder and recipe.image_tokenizer is None else _build
        with renamed_when_complete(out) as folder:
            manifest, found = build(folder, out, inputs, recipe, report, noted)
            written = {**asked, **found, "skipped": skipped}
            (folder / RECIPE_FILE).write_text(json.dumps(written, indent=1) + "\n")
    return manifest, True


def _as_json(inputs: Inputs, recipe: Recipe) -> dict:
    return json.loads(json.dumps({"inputs": asdict(inputs), "recipe": asdict(recipe)}))


def read_recipe(out: Path) -> dict[str, Any]:
    """Reads recipe.json of a data set. Raises DataError if the file is damaged."""
    path = out / RECIPE_FILE
    try:
        found = read_json(path, most_bytes=1 << 26)
        if not all(isinstance(found[section], dict) for section in ("inputs", "recipe")):
            raise ValueError("inputs and recipe must be objects")
        if not all(isinstance(each, str) for key in ("notes", "skipped") for each in found.get(key, ())):
            raise ValueError("notes and skipped must be lists of texts")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{path}: damaged ({error!r:.200}); make the data set again in another folder") from error
    return found


def _finished(out: Path, asked: dict, skip: Skip) -> Manifest | None:
    """Returns the manifest if `out` contains a complete data set with the same options; None if `out` is empty or missing.
    Calls `skip` for each file that was left out."""
    from moe_dist.formats.split_files import check_split

    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / MANIFEST_FILE).is_file() or not (out / RECIPE_FILE).is_file():
        raise ConfigError(f"--out {out}: holds files that prepare-data did not write; name an empty or new folder")
    written = read_recipe(out)
    # An option that recipe.json lacks did not exist when the folder was made; the option's default applied then.
    made = {section: values | written[section] for section, values in _as_json(Inputs(), Recipe()).items()}
    differ = [
        f"{section}.{key} is {made[section][key]!r}, asked for {value!r}"
        for section, values in asked.items()
        for key, value in values.items()
        if made[section][key] != value
    ]
    differ += [
        f"{section}.{key} is {written[section][key]!r}, an option that this version does not have"
        for section, values in asked.items()
        for key in sorted(written[section].keys() - values.keys())
    ]
    if differ:
        raise ConfigError(
            f"--out {out}: made with other options ({'; '.join(differ)}); name another folder, or remove this one"
        )
    manifest = load_manifest(out)
    for source in manifest.sources.values():
        for split in filter(None, (source.train, source.valid)):
            check_split(out, split)
    for problem in written.get("skipped", []):
        skip(DataError(f"{out} was made without a file: {problem}"))
    return manifest


@contextmanager
def renamed_when_complete(out: Path) -> Iterator[Path]:
    """Yields a hidden folder beside `out`. If the with block succeeds, this folder replaces `out`; else it is removed."""
    folder = out.parent / f".{out.name}.partial"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
        folder.replace(out)  # `out` is missing or an empty folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _build(
    folder: Path, out: Path, inputs: Inputs, recipe: Recipe, report: Report, skip: Skip
) -> tuple[Manifest, dict[str, Any]]:
    from moe_dist.data.corpus_build import build  # imported late, because a finished folder does not need it

    turns, skip_bad = None if recipe.turns is Turns.LAST else recipe.turns, recipe.skip_bad or None
    options = {
        "--messages": inputs.messages,
        "--chat-template": recipe.chat_template,
        "--turns": turns,
        "--most-tokens": recipe.most_tokens,
        "--skip-bad": skip_bad,
    }
    for option, value in options.items():
        if value is not None:
            raise ConfigError(
                f"{option} {value}: needs --tokenizer FOLDER, the Hugging Face folder of the model to train; "
                f"it is {recipe.tokenizer or 'not given'}"
            )
    manifest, figures = build(folder, out.name, _sources(inputs, skip), recipe, report, skip)
    return manifest, {"figures": figures}


def _build_chat(
    folder: Path, out: Path, inputs: Inputs, recipe: Recipe, report: Report, skip: Skip
) -> tuple[Manifest, dict[str, Any]]:
    from moe_dist.data.chat_build import build_chat
    from moe_dist.data.chat_rows import MESSAGES

    sources = {MESSAGES: inputs.messages, "text": inputs.text, **inputs.extra_text}
    paths = {name: path for name, path in sources.items() if path is not None}
    used = Inputs(text=inputs.text, extra_text=inputs.extra_text, licence=inputs.licence, messages=inputs.messages)
    chat_keys = ("seed", "val_fraction", "tokenizer", "chat_template", "turns", "most_tokens", "skip_bad")
    kept = {key: getattr(recipe, key) for key in chat_keys}
    asked, known = _as_json(inputs, recipe), _as_json(used, Recipe(**kept))
    unused = [f"--{key.replace('_', '-')}" for part in asked for key in asked[part] if asked[part][key] != known[part][key]]
    if unused:
        raise ConfigError(
            f"{', '.join(unused)}: does not apply with --tokenizer {recipe.tokenizer}, a Hugging Face folder, which "
            "encodes only --messages, --text and --extra-text; leave it out"
        )
    if not paths:
        raise ConfigError(f"--tokenizer {recipe.tokenizer}: there is nothing to encode; add --messages or --text")
    _check_names(inputs)
    read = [*paths.values(), recipe.tokenizer, recipe.chat_template]
    parts = _parts_folder(out, asked, [Path(each) for each in read if each is not None])
    try:
        manifest, notes = build_chat(folder, out.name, paths, inputs.licence, recipe, parts=parts, report=report, skip=skip)
    except (ConfigError, DataError):  # encoding again would reject the same rows
        shutil.rmtree(parts)
        raise
    shutil.rmtree(parts)
    return manifest, {"figures": {}, "notes": notes}


def _parts_folder(out: Path, asked: dict, read: list[Path]) -> Path:
    """Returns a folder beside `out` for encoded rows. Empties this folder if its rows were encoded with other options, or
    from other or changed files."""
    files = [file for path in read for file in (sorted(path.rglob("*")) if path.is_dir() else [path]) if file.is_file()]
    states = [(file, file.stat()) for file in files]
    made_of = {**asked, "files": [[str(file.resolve()), state.st_size, state.st_mtime_ns] for file, state in states]}
    folder = out.parent / f".{out.name}.parts"
    made = folder / RECIPE_FILE
    text = json.dumps(made_of).encode()
    if made.is_file() and made.stat().st_size == len(text) and made.read_bytes() == text:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    made.write_bytes(text)
    return folder


def _sources(inputs: Inputs, skip: Skip) -> Corpus:
    """Reads the sources of the data set. Imports only the modules that these inputs need."""
    from moe_dist.data.corpus_files import instruction_files, picture_files, text_files

    _check_names(inputs)
    pictures, texts = None, []
    if inputs.text is None and inputs.images is None and not inputs.instructions:
        from moe_dist.data.corpus_packages import LANGUAGES, openmoji, python_library

        if unknown := sorted(set(inputs.languages) - set(LANGUAGES)):
            raise ConfigError(f"--languages {unknown[0]}: the pictures have names in {', '.join(LANGUAGES)}")
        pictures, texts = openmoji(inputs.languages or LANGUAGES), [python_library()]
    elif inputs.languages:
        raise ConfigError(
            f"--languages {','.join(inputs.languages)}: selects captions of the default pictures, which this data "
            "set does not use; leave it out"
        )
    if inputs.images is not None:
        pictures = picture_files("images", Path(inputs.images), inputs.licence, skip)
    if inputs.text is not None:
        texts.append(text_files("text", Path(inputs.text), inputs.licence, skip))
    texts.extend(text_files(name, Path(path), inputs.licence, skip) for name, path in inputs.extra_text.items())
    instructions = [instruction_files(name, Path(path), inputs.licence) for name, path in inputs.instructions.items()]
    return Corpus(pictures, tuple(texts), tuple(instructions))


def _check_names(inputs: Inputs) -> None:
    taken = {"text", "images", "openmoji", "python", "messages"}
    for option, name in (
        *(("--extra-text", name) for name in inputs.extra_text),
        *(("--instructions", name) for name in inputs.instructions),
    ):
        try:
            TypeAdapter(Name).validate_python(name)
        except ValidationError as error:
            raise ConfigError(f"{option} {name!r}: a name has letters, digits, '.', '_' and '-' only") from error
        if name in taken:
            raise ConfigError(f"{option} {name!r}: one of {', '.join(sorted(taken))}; these names are reserved, rename it")
    if both := sorted(set(inputs.extra_text) & set(inputs.instructions)):
        raise ConfigError(f"--instructions {', '.join(both)}: --extra-text has the same name; rename one")
