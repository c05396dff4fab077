"""Checks that this machine fits a configuration: packages, the group `run.group`, and secrets. Imports no torch."""

import grp
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_dist.config.base.section import Violation
from moe_dist.config.schema import Config
from moe_dist.runtime.secrets import secrets_of


def host_violations(config: Config) -> list[Violation]:
    """Returns the rules that a configuration violates on this machine."""
    return [
        *_device_violations(config),
        *_package_violations(config),
        *group_violations(config),
        *_secret_violations(config),
    ]


def _device_violations(config: Config) -> Iterator[Violation]:
    """Yields violations for kernels that cannot run on the configured device, or cannot handle sharded parameters."""
    on_cpu = config.parallel.device == "cpu"
    apex, device = config.optimizer.needs_apex, "parallel.device"
    if apex and config.parallel.data == "fsdp2":
        yield Violation(
            ("optimizer.backend", "parallel.data"),
            "optimizer.backend=apex: its kernels do not take the sharded parameters of parallel.data=fsdp2; set "
            "parallel.data=ddp or optimizer.backend=torch",
        )
    if apex and on_cpu:
        yield Violation(
            ("optimizer.backend", device),
            "optimizer.backend=apex: its kernels need CUDA, but parallel.device=cpu; set optimizer.backend=torch, or "
            "another device",
        )
    if config.parallel.kernels.kind == "triton" and on_cpu and os.environ.get("TRITON_INTERPRET") != "1":
        yield Violation(
            ("parallel.kernels.kind", device),
            "parallel.kernels.kind=triton: Triton kernels need CUDA, but parallel.device=cpu; set "
            "parallel.kernels.kind=auto, or another device",
        )


def _package_violations(config: Config) -> Iterator[Violation]:
    """Yields violations for packages that the run needs but this machine lacks. Imports none of them. Yields nothing on a
    machine without torch, because then the ranks run on other machines."""
    if importlib.util.find_spec("torch") is None:
        return
    dispatch, engine, kernels = config.parallel.dispatch, config.engine, config.parallel.kernels.kind
    if config.optimizer.needs_apex and not installed("apex.optimizers.fused_adam"):
        yield Violation(
            ("optimizer.backend",),
            "optimizer.backend=apex: NVIDIA Apex is not installed (no apex/optimizers/fused_adam.py; the package `apex` "
            "on the Python index is another project); build it from NVIDIA's repository, or set optimizer.backend=torch",
        )
    triton = ("triton",) if kernels == "triton" else ()
    for key, kind, modules, way, other in (
        ("parallel.dispatch.kind", dispatch.kind, dispatch.needs_modules, f"build {dispatch.source}", "all_to_all"),
        ("engine.kind", engine.kind, engine.needs_modules, engine.source, "moe_dist"),
        ("parallel.kernels.kind", kernels, triton, "install it (torch for CUDA brings it)", "auto"),
    ):
        if package := " and ".join(name for name in modules if not installed(name)):
            yield Violation(
                (key,), f"{key}={kind}: the package {package} is not installed here; {way}, or set {key}={other}"
            )


def installed(module: str) -> bool:
    """Returns whether a module is installed, without importing its package."""
    package, *inside = module.split(".")
    spec = importlib.util.find_spec(package)
    if spec is None or not inside:
        return spec is not None
    return any(Path(root, *inside).with_suffix(".py").is_file() for root in spec.submodule_search_locations or ())


def group_violations(config: Config) -> list[Violation]:
    """Checks that the Unix group `run.group` exists, and that this user may assign files to it."""
    name = config.run.group
    if name is None:
        return []
    try:
        group = grp.getgrnam(name)
    except KeyError:
        return [Violation(("run.group",), f"run.group={name!r}: no group of that name here; `id -Gn` lists yours")]
    if os.geteuid() == 0 or group.gr_gid in (os.getegid(), *os.getgroups()):
        return []
    problem = f"run.group={name!r}: you are not in that group, and cannot give it a folder; `id -Gn` lists yours"
    return [Violation(("run.group",), problem)]


def _secret_violations(config: Config) -> list[Violation]:
    """Finds values of secret environment variables in the configuration, which is saved in run folder and checkpoints."""
    found = secrets_of(os.environ)
    return [
        Violation(
            (key,),
            f"{key}: its value contains the value of the environment variable {name}, and would be saved with the run; "
            "remove it and leave the secret in the environment (docs/security.md)",
        )
        for key, text in _texts(config.model_dump(mode="json"))
        for secret, name in found.items()
        if secret in text
    ]


def _texts(values: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yields (dotted key, text) for each text in a configuration. The keys of mappings count as texts, too."""
    if isinstance(values, str):
        yield key, values
    elif isinstance(values, dict | list):
        pairs = values.items() if isinstance(values, dict) else enumerate(values)
        for name, value in pairs:
            yield from _texts(value, f"{key}.{name}" if key else str(name))
            if isinstance(values, dict):
                yield key, str(name)
