"""Reads and writes the records of an experiment. The file is a gzip file of JSON lines: the first line identifies the
rules, and each further line is the record of a run.

The file is committed. A record has a few kilobytes, and contains all data for tables, plots and verdicts.
"""

import gzip
import json
import os
import re
import subprocess
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import moe_dist
from moe_dist.config.bundled import VERSION
from moe_dist.errors import ConfigError, DataError
from moe_dist.runtime.files import write_atomically
from moe_dist.runtime.provenance import code_state
from research.experiments.study import PILOT, Study, fingerprint


def results_path(study: Study, *, pilot: bool) -> Path:
    """Returns the path of the records. The records of a pilot are not committed."""
    if pilot:
        return Path(study.runs) / f"{study.name}-{PILOT}" / "results.jsonl.gz"
    return Path(study.records) / f"{study.name}.jsonl.gz"


def check_rules(path: Path, study_path: Path, study: Study) -> str:
    """Returns the commit of the rules: the last commit that changed the study's file or its base configuration.

    Raises:
        ConfigError: the study lacks the values that the pilot fixes, a file with rules has uncommitted changes, or the
            results at `path` were made under other rules.
    """
    if not study.pilot.found:
        raise ConfigError(
            f"{study_path}: pilot.found is empty: run --pilot, write there what it fixed (learning rate, steps, "
            "coefficients), set it in the arms, and commit the file"
        )
    files = [str(study_path), str(study.base_path)]
    if run_git("ls-files", "--error-unmatch", "--", *files) is None:
        raise ConfigError(
            f"{' and '.join(files)} must be committed before runs that count: the rules come before the results; commit "
            "them, or run --pilot"
        )
    if run_git("diff", "--quiet", "HEAD", "--", *files) is None:
        raise ConfigError(
            f"{' or '.join(files)} differs from what is committed: the rules come before the results; commit the change, "
            "undo it, or run --pilot"
        )
    check_code(study)
    commit = (run_git("log", "-1", "--format=%H", "--", *files) or "").strip()
    header = read_header(path)
    if header is not None and header.get("fingerprint") != fingerprint(study_path, study):
        raise ConfigError(
            f"{path} holds results by the rules of commit {header.get('rules')}, and {study_path} or its base has changed "
            f"since (now {commit}); put those back, or move {path} aside to begin anew: what was found stays in git"
        )
    return commit


def check_code(study: Study) -> None:
    """Raises ConfigError if `committed_code` is set and the code differs from the current commit."""
    if study.committed_code and code_of_now()["changed"]:
        raise ConfigError(
            "the code differs from what is committed, and committed_code asks that a record's code can be rebuilt; commit "
            "or undo the change, or run --pilot"
        )


def read_header(path: Path) -> dict[str, Any] | None:
    """Returns the first line of the records; None if there is no file."""
    lines = _lines(path)
    if lines and "fingerprint" not in lines[0]:
        raise DataError(f"{path}: its first line must say by which rules it was made; it is damaged: take it from git")
    return lines[0] if lines else None


def read_records(path: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """Reads all records; the keys are (arm, seed).

    Raises:
        DataError: a line is not a record.
    """
    records = {}
    for number, line in enumerate(_lines(path)[1:], 2):
        try:
            records[line["arm"], line["seed"]] = line
        except (KeyError, TypeError) as error:
            raise DataError(f"{path}, line {number}: is no record of a run; take the file from git") from error
    return records


def add_record(path: Path, header: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """Adds the record of a run, or replaces it. The whole file is written anew, so that a crash leaves either the old file
    or the new file."""
    lines = _lines(path) or [dict(header)]
    kept = [line for line in lines[1:] if (line["arm"], line["seed"]) != (record["arm"], record["seed"])]
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = [json.dumps(rounded(each), separators=(",", ":"), allow_nan=False) for each in [lines[0], *kept, record]]
    content = gzip.compress(("\n".join(texts) + "\n").encode(), mtime=0)  # no timestamp: equal records give equal bytes
    write_atomically(path, content)


def make_header(study_path: Path, study: Study, rules: str | None) -> dict[str, Any]:
    return {"study": study.name, "fingerprint": fingerprint(study_path, study), "rules": rules}


def code_of_now() -> dict[str, Any]:
    """Returns the current commit. "changed" is true if the code differs from this commit, or has new .py or .yaml files.
    Files in docs/ and research/records/ do not count as code, because records are written there. Without git, also returns
    the "version" of the package."""
    commit, diff, untracked = code_state(Path(moe_dist.__file__).parent)
    headers = re.findall(rb"^diff --git .*$", diff, re.MULTILINE)
    documents = re.compile(rb"diff --git a/(docs|research/records)/.* b/(docs|research/records)/.*")
    new = any(name.endswith((".py", ".yaml")) and not name.startswith(("docs/", "research/records/")) for name in untracked)
    version = {} if commit else {"version": VERSION}
    return {"commit": commit, "changed": new or any(not documents.fullmatch(each) for each in headers), **version}


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    try:
        texts = gzip.decompress(path.read_bytes()).decode().splitlines()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be decompressed ({error}); take the file from git") from error
    found = []
    for number, text in enumerate(texts, 1):
        try:
            found.append(json.loads(text))
        except ValueError as error:
            raise DataError(f"{path}, line {number}: is not JSON ({error}); take the file from git") from error
    return found


def rounded(value: Any) -> Any:
    """Rounds floats to six significant digits, because more digits would suggest a precision that was not measured."""
    return json.loads(json.dumps(value), parse_float=lambda text: float(f"{float(text):.6g}"))


def run_git(*arguments: str) -> str | None:
    """Returns the output of a git command in this folder; None if the command failed."""
    try:
        done = subprocess.run(
            ["git", *arguments],
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None
