"""When the exposure warning for Ray is given."""

import os
import socket
import subprocess
import sys

import pytest

from launchers.ray.exposure import exposure_text, listening


@pytest.mark.parametrize(
    ("addresses", "token", "warned"),
    [
        ({"GCS": ["127.0.0.1"], "dashboard": ["::1", "localhost"]}, False, False),
        ({"GCS": ["::"]}, False, True),
        ({"GCS": ["127.0.0.1"], "dashboard": ["0.0.0.0"]}, False, True),
        ({"GCS": ["10.0.0.7"]}, False, True),
        ({"GCS": ["10.0.0.7"]}, True, False),
    ],
)
def test_a_warning_is_given_for_a_network_address_without_a_token(
    addresses: dict[str, list[str]], token: bool, warned: bool
) -> None:
    text = exposure_text(addresses, token=token)
    assert bool(text) == warned
    if warned:
        part, address = next((part, each) for part, listens in addresses.items() for each in listens if each != "127.0.0.1")
        assert f"{part} at {address}" in text
        assert "RAY_AUTH_MODE=token" in text


def test_a_local_part_is_checked_by_its_sockets_not_by_its_announced_address() -> None:
    with socket.create_server(("0.0.0.0", 0)) as wide, socket.create_server(("127.0.0.1", 0)) as narrow:
        ports = [each.getsockname()[1] for each in (wide, narrow)]
        found = listening({"GCS": f"127.0.0.100:{ports[0]}", "dashboard": f"127.0.0.1:{ports[1]}"})
    assert found == {"GCS": ["0.0.0.0"], "dashboard": ["127.0.0.1"]}


def test_a_part_elsewhere_is_judged_by_its_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    assert listening({"GCS": f"10.1.2.3:{port}"}) == {"GCS": ["10.1.2.3"]}


@pytest.mark.parametrize("mode", ["token", "disabled"])
def test_whether_ray_asks_for_a_token_is_asked_of_ray(mode: str) -> None:
    """In a process of its own: Ray reads the mode once."""
    show = "from launchers.ray.exposure import asks_for_token; print(asks_for_token())"
    env = {**os.environ, "RAY_AUTH_MODE": mode}
    done = subprocess.run([sys.executable, "-c", show], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == f"{mode == 'token'}\n"
