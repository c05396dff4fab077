"""A job of Ray's job API from outside: submit it, follow it, stop it, and get its verdict."""

import asyncio
import re
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from launchers.ending import ABORTED
from launchers.snapshot import code_folder
from moe_dist.errors import EXIT_DONE, EXIT_FAILED, ConfigError, PlacementError

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"  # Ray kills the driver so many seconds after `ray job stop`
POLL_SECONDS = 1.0
_VERDICT = re.compile(r"^moe_dist ends with verdict (\d+)$", re.MULTILINE)


def verdict_line(code: int) -> str:
    """The last line of a job's log. A stopped job has no exit code in Ray's API, so it is read from here."""
    return f"moe_dist ends with verdict {code}"


def entrypoint(arguments: Sequence[str], python: str | None) -> str:
    """The shell line that a job runs, every word quoted."""
    return shlex.join([python or "python", "-m", "launchers.ray", *arguments])


def submit(address: str, line: str, variables: Mapping[str, str]) -> int:
    """Submits a job from this clone, shows its log and returns its verdict.

    Args:
        address: Of Ray's dashboard, as http://127.0.0.1:8265.
        line: What to run.
        variables: Of the job and its ranks, RAY_JOB_STOP_WAIT_TIME_S among them.

    Raises:
        PlacementError: nobody answers there.
    """
    client = connect(address)
    job_id = client.submit_job(
        entrypoint=line, runtime_env={"working_dir": str(code_folder()), "env_vars": dict(variables)}
    )
    again = f"moe-dist launch ray --stop {job_id} --submit {address}"
    print(f"job {job_id}: {line}\nstop it, and wait for its save, with: {again}", file=sys.stderr, flush=True)
    try:
        return follow_job(client, job_id)
    except KeyboardInterrupt:
        print(f"\nno longer following; job {job_id} goes on. Stop it with: {again}", file=sys.stderr)
        return ABORTED


def stop(address: str, job_id: str) -> int:
    """Stops a job, waits until it has saved and ended, and returns its verdict.

    Raises:
        ConfigError: there is no such job.
        PlacementError: nobody answers there.
    """
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
    """A client of the job API.

    Raises:
        PlacementError: nobody answers at the address.
    """
    from ray.exceptions import RayError
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:  # without http:// Ray takes it for that of a GCS
        raise PlacementError(
            f"--submit {address}: {str(error).splitlines()[0]}; it must be the address of the dashboard, as "
            "http://127.0.0.1:8265 on the head",
            see="docs/ray.md",
        ) from error


def follow_job(client: "JobSubmissionClient", job_id: str) -> int:
    """Shows a job's log until it has ended; returns its verdict."""
    shown = _Shown()
    while True:
        broken: Exception | None = None
        try:
            asyncio.run(_show(client, job_id, shown))
        except (RuntimeError, OSError) as error:  # the connection broke; what became of the job is asked below
            broken = error
        details = client.get_job_info(job_id)
        if details.status.is_terminal():
            log = client.get_job_logs(job_id)
            print(log[shown.characters :], end="", flush=True)
            return verdict(details, log)
        if broken is not None:
            print(f"[following {job_id} again: {broken}]", file=sys.stderr)
        time.sleep(POLL_SECONDS)


def verdict(details: "JobDetails", log: str) -> int:
    """The verdict of a job that has ended: its exit code, or what its last line says where Ray keeps none."""
    if details.driver_exit_code is not None:
        return details.driver_exit_code
    if found := _VERDICT.findall(log):
        return int(found[-1])
    if str(details.status) == "SUCCEEDED":
        return EXIT_DONE
    print(
        f"the job ended without a verdict ({details.status}): {details.message or 'no word from Ray'}; if it was stopped, "
        f"its grace was too short for its save ({STOP_WAIT})",
        file=sys.stderr,
    )
    return EXIT_FAILED


@dataclass
class _Shown:
    """How much of a log was shown, over all connections."""

    characters: int = 0


async def _show(client: Any, job_id: str, shown: _Shown) -> None:
    """Prints what of the log was not yet shown; each connection gets it from the beginning."""
    seen = 0
    async for text in client.tail_job_logs(job_id):
        new = text[max(0, shown.characters - seen) :]
        seen += len(text)
        if new:
            print(new, end="", flush=True)
            shown.characters = seen
