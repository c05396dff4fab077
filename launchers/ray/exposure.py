"""Whether others than this machine reach Ray: it runs what it is sent, and asks for a token only where that was set up."""

import ipaddress
from collections.abc import Mapping, Sequence

import psutil


def listening(parts: Mapping[str, str]) -> dict[str, list[str]]:
    """The addresses at which parts of Ray listen. Of those on this machine by its sockets, since Ray listens at more than
    the address it goes by; of others by that address.

    Args:
        parts: host:port of each, by name.
    """
    found: dict[str, list[str]] = {}
    sockets = [each.laddr for each in psutil.net_connections("tcp") if each.status == psutil.CONN_LISTEN and each.laddr]
    for part, address in parts.items():
        host, _, port = address.rpartition(":")
        found[part] = sorted({each.ip for each in sockets if each.port == int(port)}) or [host.strip("[]")]
    return found


def exposure_text(addresses: Mapping[str, Sequence[str]], *, token: bool) -> str:
    """A warning where a part of Ray can be reached from beyond the loopback without a token; else nothing.

    Args:
        addresses: At which each part listens.
    """
    beyond = [f"{part} at {each}" for part, listens in addresses.items() for each in listens if not _is_loopback(each)]
    if token or not beyond:
        return ""
    line = "!" * 100
    return (
        f"{line}\nWARNING: this Ray listens beyond the loopback ({', '.join(beyond)}) and asks for no token:\n"
        "whoever reaches it runs any code, as you, on every node. Start all of it with RAY_AUTH_MODE=token,\n"
        f"or keep its ports inside a network of its own (docs/ray.md).\n{line}"
    )


def asks_for_token() -> bool:
    """Whether the Ray that this process is connected to asks for a token."""
    try:
        from ray._raylet import AuthenticationMode, get_authentication_mode  # pyright: ignore
    except ImportError:  # a Ray from before tokens
        return False
    return get_authentication_mode() == AuthenticationMode.TOKEN


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"
