"""The records of an experiment: one line of JSON for each run, and a first line that says by which rules they were made.

The file is committed; a record of a few kilobytes holds all that tables, plots and verdicts are made of.
"""

import json
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import moe_dist
from moe_dist.errors import ConfigError, DataError
from moe_dist.runtime.files import write_atomically
from moe_dist.runtime.provenance import code_state
from tools.experiments.study import PILOT, RESULTS, ROOT, Study, fingerprint


def results_path(study: Study, *, pilot: bool) -> Path:
    """Where the records are; a pilot's are not for the repository."""
    return ROOT / f"{study.name}-{PILOT}" / "results.jsonl" if pilot else RESULTS / f"{study.name}.jsonl"


def committed_rules(study_path: Path, study: Study) -> str:
    """The commit that last changed the study's file or its base.

    Raises:
        ConfigError: one of them is not committed as it stands: what counts is decided before it runs.
    """
    files = [str(study_path), study.base]
    if _git("ls-files", "--error-unmatch", "--", *files) is None:
        raise ConfigError(
            f"{' and '.join(files)} must be committed before runs that count: the rules stand before the results; commit "
            "them, or run --pilot"
        )
    if _git("diff", "--quiet", "HEAD", "--", *files) is None:
        raise ConfigError(
            f"{' or '.join(files)} differs from what is committed: the rules stand before the results; commit the change, "
            "undo it, or run --pilot"
        )
    return (_git("log", "-1", "--format=%H", "--", *files) or "").strip()


def check_rules(path: Path, study_path: Path, study: Study) -> str:
    """The commit of the rules, where earlier results were made by the same ones.

    Raises:
        ConfigError: the rules are not committed, or are others than those of the results that are there; or no pilot has
            fixed what a pilot fixes.
    """
    if not study.pilot.found:
        raise ConfigError(
            f"{study_path}: pilot.found is empty: run --pilot, write there what it fixed (learning rate, steps, "
            "coefficients), set it in the arms, and commit the file"
        )
    commit = committed_rules(study_path, study)
    header = read_header(path)
    if header is not None and header.get("fingerprint") != fingerprint(study_path, study):
        raise ConfigError(
            f"{path} holds results by the rules of commit {header.get('rules')}, and {study_path} or its base has changed "
            f"since (now {commit}); put those back, or move {path} aside to begin anew: what was found stays in git"
        )
    return commit


def read_header(path: Path) -> dict[str, Any] | None:
    """The first line, None where there is no file."""
    lines = _lines(path)
    if lines and "fingerprint" not in lines[0]:
        raise DataError(f"{path}: its first line must say by which rules it was made; it is damaged: take it from git")
    return lines[0] if lines else None


def read_records(path: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """All records by (arm, seed).

    Raises:
        DataError: a line is none.
    """
    records = {}
    for number, line in enumerate(_lines(path)[1:], 2):
        try:
            records[line["arm"], line["seed"]] = line
        except (KeyError, TypeError) as error:
            raise DataError(f"{path}, line {number}: is no record of a run; take the file from git") from error
    return records


def add_record(path: Path, header: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """Adds a record, replacing the file whole: a crash leaves the old one or the new one."""
    lines = _lines(path) or [dict(header)]
    kept = [line for line in lines[1:] if (line["arm"], line["seed"]) != (record["arm"], record["seed"])]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(_line(each) for each in [lines[0], *kept, record]))


def make_header(study_path: Path, study: Study, rules: str | None) -> dict[str, Any]:
    return {"study": study.name, "fingerprint": fingerprint(study_path, study), "rules": rules}


def code_of_now() -> dict[str, Any]:
    """Commit of the code, and whether it differs from that: documents, records among them, are no code."""
    commit, diff, _ = code_state(Path(moe_dist.__file__).parent)
    headers = re.findall(rb"^diff --git .*$", diff, re.MULTILINE)
    documents = re.compile(rb"diff --git a/docs/.* b/docs/.*")
    return {"commit": commit, "changed": any(not documents.fullmatch(each) for each in headers)}


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    found = []
    for number, text in enumerate(path.read_text().splitlines(), 1):
        try:
            found.append(json.loads(text))
        except ValueError as error:
            raise DataError(f"{path}, line {number}: is not JSON ({error}); take the file from git") from error
    return found


def rounded(value: Any) -> Any:
    """Floats to six significant digits: what is written is small, and says no more than was measured."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [rounded(each) for each in value]
    return value


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(rounded(record), separators=(",", ":"), allow_nan=False) + "\n"


def _git(*arguments: str) -> str | None:
    """Output of a git command in this folder; None where it failed."""
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
