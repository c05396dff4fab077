"""The checks warn if a Ray cluster is exposed without a token, and if `ray job stop` leaves too little time for a save."""

import socket

import pytest

from launchers.ray import checks
from launchers.ray.checks import check_exposure, check_stop_grace, listening, stop_grace
from moe_dist.runtime.node.check_result import Level

JOB = {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}


@pytest.mark.parametrize(
    ("addresses", "token", "exposed"),
    [
        ({"GCS": ["127.0.0.1"], "dashboard": ["::1", "localhost"]}, False, None),
        ({"GCS": ["::"]}, False, "GCS at ::"),
        ({"GCS": ["127.0.0.1"], "dashboard": ["0.0.0.0"]}, False, "dashboard at 0.0.0.0"),
        ({"GCS": ["10.0.0.7"]}, False, "GCS at 10.0.0.7"),
        ({"GCS": ["10.0.0.7"]}, True, None),
    ],
)
def test_a_warning_is_given_for_a_network_address_without_a_token(
    addresses: dict[str, list[str]], token: bool, exposed: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "listening", lambda parts: addresses)
    monkeypatch.setattr(checks, "asks_for_token", lambda: token)
    found = check_exposure({})
    assert found.level is (Level.OK if exposed is None else Level.WARNING)
    assert (exposed or "") in found.text


def test_a_local_part_is_checked_by_its_sockets_and_one_elsewhere_by_its_address() -> None:
    with socket.create_server(("0.0.0.0", 0)) as wide, socket.create_server(("127.0.0.1", 0)) as narrow:
        ports = [each.getsockname()[1] for each in (wide, narrow)]
        found = listening({"GCS": f"127.0.0.100:{ports[0]}", "dashboard": f"127.0.0.1:{ports[1]}"})
    assert found == {"GCS": ["0.0.0.0"], "dashboard": ["127.0.0.1"]}
    assert listening({"GCS": f"10.1.2.3:{ports[0]}"}) == {"GCS": ["10.1.2.3"]}, "nothing listens there now"


@pytest.mark.parametrize(
    ("env", "seconds"),
    [
        ({}, None),
        (JOB, 3.0),
        ({**JOB, "RAY_JOB_STOP_WAIT_TIME_S": "300"}, 300.0),
        ({**JOB, "RAY_JOB_STOP_WAIT_TIME_S": "x"}, 3.0),
    ],
    ids=["no job", "Ray's default", "set", "no number"],
)
def test_the_grace_is_that_of_rays_job_api(env: dict[str, str], seconds: float | None) -> None:
    assert stop_grace(env) == seconds


@pytest.mark.parametrize(
    ("grace", "save", "level"),
    [
        (None, 5.0, Level.NOTE),
        (300.0, None, Level.NOTE),
        (300.0, 30.0, Level.OK),
        (300.0, 290.0, Level.WARNING),  # the driver keeps a tenth of the grace time
        (3.0, None, Level.WARNING),
        (3.0, 0.1, Level.WARNING),
    ],
)
def test_a_grace_too_short_for_the_measured_saves_is_warned_of(
    grace: float | None, save: float | None, level: Level
) -> None:
    assert check_stop_grace(grace, save).level is level
