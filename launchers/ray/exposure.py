"""Finds out whether other machines can reach Ray without a token, because Ray runs any code that a client sends."""

import ipaddress
from collections.abc import Mapping, Sequence

import psutil


def listening(parts: Mapping[str, str]) -> dict[str, list[str]]:
    """Returns the addresses at which parts of Ray listen; `parts` maps the name of each part to its announced host:port. A
    part of Ray on this machine may listen at more addresses than it announces. The addresses of a part on this machine are
    therefore read from the list of sockets. For a part of Ray on another machine only the announced address is known."""
    found: dict[str, list[str]] = {}
    connections = psutil.net_connections("tcp")  # scans /proc
    sockets = [each.laddr for each in connections if each.status == psutil.CONN_LISTEN and each.laddr]
    for part, address in parts.items():
        host, _, port = address.rpartition(":")
        found[part] = sorted({each.ip for each in sockets if each.port == int(port)}) or [host.strip("[]")]
    return found


def exposure_text(addresses: Mapping[str, Sequence[str]], *, token: bool) -> str:
    """Returns a warning if a part of Ray accepts connections from other machines without a token; otherwise ''. `addresses`
    maps each part to the addresses at which it listens."""
    beyond = [f"{part} at {each}" for part, listens in addresses.items() for each in listens if not _is_loopback(each)]
    if token or not beyond:
        return ""
    line = "!" * 100
    return (
        f"{line}\nWARNING: Ray accepts connections from other machines ({', '.join(beyond)}) without a token:\n"
        "anyone who connects can run any code as you on every node. Start all of Ray with RAY_AUTH_MODE=token,\n"
        f"or keep its ports inside a private network (docs/ray.md).\n{line}"
    )


def asks_for_token() -> bool:
    """Returns whether the connected Ray requires a token."""
    try:
        from ray._raylet import AuthenticationMode, get_authentication_mode  # pyright: ignore
    except ImportError:  # an older Ray without tokens
        return False
    return get_authentication_mode() == AuthenticationMode.TOKEN


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"
