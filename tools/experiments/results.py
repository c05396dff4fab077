"""The records of an experiment: one line of JSON for each run, after a first line that identifies the rules.

The file is committed. A record takes a few kilobytes and contains all data of tables, plots and verdicts.
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
    """Path of the records; those of a pilot are not for the repository."""
    return ROOT / f"{study.name}-{PILOT}" / "results.jsonl" if pilot else RESULTS / f"{study.name}.jsonl"


def committed_rules(study_path: Path, study: Study) -> str:
    """The commit that last changed the study's file or its base.

    Raises:
        ConfigError: one of them is not committed as it stands; rules must be fixed before the runs.
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
    """The commit of the rules, if earlier results were made under the same rules.

    Raises:
        ConfigError: the rules are not committed, or differ from those of existing results; or the pilot has not fixed its
            values.
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
    """The first line; None if there is no file."""
    lines = _lines(path)
    if lines and "fingerprint" not in lines[0]:
        raise DataError(f"{path}: its first line must say by which rules it was made; it is damaged: take it from git")
    return lines[0] if lines else None


def read_records(path: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """All records by (arm, seed).

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
    """Adds a record and replaces the whole file, so that a crash leaves either the old or the new one."""
    lines = _lines(path) or [dict(header)]
    kept = [line for line in lines[1:] if (line["arm"], line["seed"]) != (record["arm"], record["seed"])]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(_line(each) for each in [lines[0], *kept, record]))


def make_header(study_path: Path, study: Study, rules: str | None) -> dict[str, Any]:
    return {"study": study.name, "fingerprint": fingerprint(study_path, study), "rules": rules}


def code_of_now() -> dict[str, Any]:
    """Commit of the code, and whether the code differs from it; documents, records among them, do not count as code."""
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
    """Rounds floats to six significant digits, which keeps files small and suggests no more precision than was measured."""
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
    """Output of a git command in this folder; None if it failed."""
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
