"""A client of Ray's job API: submits a job, follows its log, stops it, and returns its verdict (the run's exit code)."""

import asyncio
import contextlib
import json
import os
import re
import secrets
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launchers.rank_tracker import ABORTED
from launchers.ray.job import require_variables
from launchers.snapshot import code_folder
from moe_dist.config.regular_file import read_regular
from moe_dist.config.schema import Config
from moe_dist.errors import EXIT_DONE, EXIT_FAILED, ConfigError, ResourceError
from moe_dist.runtime.files import write_atomically
from moe_dist.runtime.run_folder import RunFolder

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

IN_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by Ray's job API in the driver's environment
STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"  # seconds from `ray job stop` until Ray kills the driver
POLL_SECONDS = 1.0
LOST_SECONDS = 10.0  # Ray's head counts as lost after this many seconds without an answer
_VERDICT = re.compile(r"^moe_dist ends with verdict (\d+)$", re.MULTILINE)


def verdict_line(code: int) -> str:
    """Returns the last line of a job's log, from which `verdict` reads the exit code. Ray's API gives no exit code for a
    stopped job."""
    return f"moe_dist ends with verdict {code}"


def entrypoint(arguments: Sequence[str], python: str | None) -> str:
    """Returns the shell command of a job, with every word quoted."""
    return shlex.join([python or "python", "-m", "launchers.ray", *arguments])


def submit(address: str, line: str, *, grace_seconds: int, config: Config, forwarded: Sequence[str]) -> int:
    """Submits a job from this clone, prints its log and returns its verdict.

    Args:
        address: Address of Ray's dashboard, such as http://127.0.0.1:8265.
        grace_seconds: Time from a stop until Ray kills the driver.
        forwarded: Names of environment variables that are passed to the ranks.

    Raises:
        ConfigError: a variable is not set.
        ResourceError: no Ray answers at the address.
    """
    require_variables(forwarded, os.environ)
    client = connect(address)
    runtime_env = {"working_dir": str(code_folder()), "env_vars": {STOP_WAIT: str(grace_seconds)}}  # Ray reads STOP_WAIT
    with contextlib.ExitStack() as if_refused:
        if forwarded:
            path = hand_over(forwarded, RunFolder.of(config))
            if_refused.callback(path.unlink, missing_ok=True)
            line += f" --env-file={shlex.quote(str(path))}"
        job_id = client.submit_job(entrypoint=line, runtime_env=runtime_env)
        if_refused.pop_all()  # keeps the file: the job was accepted, and its driver deletes the file
    again = f"moe-dist launch ray --stop {job_id} --submit {address}"
    print(f"job {job_id}: {line}\nto stop it and wait for its save: {again}", file=sys.stderr, flush=True)
    folder = RunFolder.of(config)
    known = {each.attempt_id for each in folder.read_status().attempts}
    try:
        return follow_job(client, job_id)
    except (RuntimeError, OSError) as error:
        latest = folder.read_status().latest
        code = latest.verdict if latest is not None and latest.attempt_id not in known else None
        print(
            f"Ray's head at {address} does not answer ({str(error).splitlines()[0]}); {folder.status_json} has "
            + ("no verdict of this job; the same command resumes the run" if code is None else f"the verdict {code}"),
            file=sys.stderr,
        )
        return EXIT_FAILED if code is None else code
    except KeyboardInterrupt:
        print(f"\nno longer following the log; job {job_id} continues. Stop it with: {again}", file=sys.stderr)
        return ABORTED


def hand_over(names: Sequence[str], folder: RunFolder) -> Path:
    """Writes environment variables for the driver into a file of mode 0600 in the run folder, and returns its path. The
    job's runtime environment is not used, because Ray shows it in the job list and in logs that every user can read."""
    folder.prepare()
    path = folder.path.absolute() / f".env_{secrets.token_hex(8)}"
    write_atomically(path, json.dumps({name: os.environ[name] for name in names}), mode=0o600)
    return path


def take_over(path: Path) -> tuple[str, ...]:
    """Reads the variables that `hand_over` wrote into this process's environment, and deletes the file. Returns the names
    of the variables. Raises ConfigError if the file cannot be read."""
    try:
        variables = json.loads(read_regular(path, most_bytes=1 << 20, links=False))
        path.unlink()
    except OSError as error:
        raise ConfigError(
            f"--env-file={path}: {error.strerror}; submit again as the user that runs Ray, on a machine with the nodes' "
            "shared file system",
            see="docs/ray.md",
        ) from error
    os.environ.update(variables)
    return tuple(variables)


def stop(address: str, job_id: str) -> int:
    """Stops a job, waits until it has saved and ended, and returns its verdict. Raises ConfigError if Ray has no job with
    this id."""
    client = connect(address)
    try:
        running = client.stop_job(job_id)
    except RuntimeError as error:
        raise ConfigError(f"--stop {job_id}: {str(error).splitlines()[0]}; `ray job list` shows the jobs") from error
    if running:
        print(f"job {job_id}: asked to stop; waiting for its save", file=sys.stderr, flush=True)
    while not (details := client.get_job_info(job_id)).status.is_terminal():
        time.sleep(POLL_SECONDS)
    code = verdict(details, client.get_job_logs(job_id))
    print(f"job {job_id}: {details.status}, verdict {code}", file=sys.stderr)
    return code


def connect(address: str) -> "JobSubmissionClient":
    """Returns a client of the job API. Raises ResourceError if no Ray answers at the address."""
    from ray.exceptions import RayError
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:  # without http:// Ray tries to connect to a GCS
        raise ResourceError(
            f"--submit {address}: {str(error).splitlines()[0]}; it must be the address of the dashboard, as "
            "http://127.0.0.1:8265 on the head",
            see="docs/ray.md",
        ) from error


def follow_job(client: "JobSubmissionClient", job_id: str) -> int:
    """Prints a job's log to its end; returns its verdict. Raises OSError or RuntimeError if Ray's head is gone."""
    shown, answered = _Shown(), time.monotonic()
    while True:
        broken: Exception | None = None
        try:
            asyncio.run(_show(client, job_id, shown))
        except (RuntimeError, OSError) as error:  # connection lost; the next lines query the job
            broken = error
        try:
            details = client.get_job_info(job_id)  # polls, because Ray has no call that waits for a job
            answered = time.monotonic()
        except (RuntimeError, OSError):
            if time.monotonic() - answered > LOST_SECONDS:
                raise
            time.sleep(POLL_SECONDS)
            continue
        if details.status.is_terminal():
            log = client.get_job_logs(job_id)
            print(log[shown.characters :], end="", flush=True)  # the part of the log that was not printed yet
            return verdict(details, log)
        if broken is not None:
            print(f"[following {job_id} again: {broken}]", file=sys.stderr)
        time.sleep(POLL_SECONDS)


def verdict(details: "JobDetails", log: str) -> int:
    """Returns the verdict of an ended job: its exit code, or the code in the log's last line if Ray has none."""
    code = details.driver_exit_code
    if code is not None and 0 <= code < 128:
        return code
    if found := _VERDICT.findall(log):
        return int(found[-1])
    if str(details.status) == "SUCCEEDED":
        return EXIT_DONE
    print(
        f"the job ended without a verdict ({details.status}): {details.message or 'no message from Ray'}; if a stop "
        f"killed its driver, the grace period was shorter than the save ({STOP_WAIT}); the same command resumes the run",
        file=sys.stderr,
    )
    return EXIT_FAILED


@dataclass
class _Shown:
    """The number of characters of a job's log that were printed so far, over all connections."""

    characters: int = 0


async def _show(client: Any, job_id: str, shown: _Shown) -> None:
    """Prints the part of the log that was not printed yet; each connection sends the log from the beginning."""
    seen = 0
    async for text in client.tail_job_logs(job_id):
        new = text[max(0, shown.characters - seen) :]
        seen += len(text)
        if new:
            print(new, end="", flush=True)
            shown.characters = seen
