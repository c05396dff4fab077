"""Checks that a configuration can run on this machine: packages, the group of `run.group`, and secrets. Imports no
torch."""

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
    """Returns the rules that the configuration violates on this machine."""
    checks = (
        apex_violations,
        _dispatch_violations,
        _engine_violations,
        _kernel_violations,
        group_violations,
        _secret_violations,
    )
    return [violation for check in checks for violation in check(config)]


def apex_violations(config: Config) -> list[Violation]:
    """Checks for optimizer.backend=apex: Apex must be installed, and its kernels need whole parameters on CUDA.

    Does not import Apex. If torch is missing on this machine, does not look for Apex, because the ranks then run on other
    machines.
    """
    if not config.optimizer.needs_apex:
        return []
    found = [
        (
            config.parallel.data == "fsdp2",
            ("optimizer.backend", "parallel.data"),
            "its kernels do not take the sharded parameters of parallel.data=fsdp2; set parallel.data=ddp or "
            "optimizer.backend=torch",
        ),
        (
            config.parallel.device == "cpu",
            ("optimizer.backend", "parallel.device"),
            "its kernels need CUDA, but parallel.device=cpu; set optimizer.backend=torch, or another device",
        ),
        (
            importlib.util.find_spec("torch") is not None and not _has_apex(),
            ("optimizer.backend",),
            "NVIDIA Apex is not installed (no apex/optimizers/fused_adam.py; the package `apex` on the Python index is "
            "another project); build it from NVIDIA's repository, or set optimizer.backend=torch",
        ),
    ]
    return [Violation(keys, f"optimizer.backend=apex: {problem}") for holds, keys, problem in found if holds]


def _dispatch_violations(config: Config) -> list[Violation]:
    """Checks that the dispatcher's packages are installed. Like the check for Apex, does nothing if torch is missing."""
    dispatch = config.parallel.dispatch
    if importlib.util.find_spec("torch") is None:
        return []
    missing = [name for name in dispatch.needs_modules if not installed(name)]
    if not missing:
        return []
    problem = (
        f"{dispatch.name}: the package {' and '.join(missing)} is not installed here; build {dispatch.source}, or set "
        "parallel.dispatch.kind=all_to_all"
    )
    return [Violation(("parallel.dispatch.kind",), problem)]


def _engine_violations(config: Config) -> list[Violation]:
    """Checks that the engine's packages are installed. Like the check for Apex, does nothing if torch is missing."""
    missing = [name for name in config.engine.needs_modules if not installed(name)]
    if not missing or importlib.util.find_spec("torch") is None:
        return []
    problem = (
        f"engine.kind={config.engine.kind}: the package {' and '.join(missing)} is not installed here; "
        f"{config.engine.source}, or set engine.kind=moe_dist"
    )
    return [Violation(("engine.kind",), problem)]


def _kernel_violations(config: Config) -> list[Violation]:
    """Checks for parallel.kernels.kind=triton: the run needs a device that Triton supports and, unless torch is missing
    too, the package triton."""
    key = "parallel.kernels.kind"
    if config.parallel.kernels.kind != "triton":
        return []
    found = [
        (
            config.parallel.device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1",
            (key, "parallel.device"),
            "Triton kernels need CUDA, but parallel.device=cpu; set parallel.kernels.kind=auto, or another device",
        ),
        (
            importlib.util.find_spec("torch") is not None and importlib.util.find_spec("triton") is None,
            (key,),
            "the package triton is not installed here; install it (torch for CUDA brings it), or set "
            "parallel.kernels.kind=auto",
        ),
    ]
    return [Violation(keys, f"{key}=triton: {problem}") for holds, keys, problem in found if holds]


def installed(module: str) -> bool:
    """Returns whether a module is installed, without importing its package."""
    package, *inside = module.split(".")
    spec = importlib.util.find_spec(package)
    if spec is None or not inside:
        return spec is not None
    return any(Path(root, *inside).with_suffix(".py").is_file() for root in spec.submodule_search_locations or ())


def group_violations(config: Config) -> list[Violation]:
    """Checks that the Unix group `run.group` exists, and that this user may set it as the group of files."""
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
    """Finds values of secret environment variables in the configuration, which is saved in the run folder and
    checkpoints."""
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
    """Yields (dotted key, text) for each text of a configuration. Keys of mappings count as texts too."""
    if isinstance(values, str):
        yield key, values
    elif isinstance(values, dict | list):
        pairs = values.items() if isinstance(values, dict) else enumerate(values)
        for name, value in pairs:
            yield from _texts(value, f"{key}.{name}" if key else str(name))
            if isinstance(values, dict):
                yield key, str(name)


def _has_apex() -> bool:
    spec = importlib.util.find_spec("apex")
    folders = spec.submodule_search_locations if spec is not None else None
    return any((Path(folder) / "optimizers" / "fused_adam.py").is_file() for folder in folders or ())
