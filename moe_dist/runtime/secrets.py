"""Removes secrets of the environment from text before it is logged or stored.

moe_dist never writes environment variables. But an exception may quote a URL with its key, and a user may pass a key as an
override: such secrets are found by their value.
"""

import re
from collections.abc import Mapping

# Whole words of a variable's name: WANDB_API_KEY, HF_TOKEN, AWS_SECRET_ACCESS_KEY; not TOKENIZERS_PARALLELISM or KEYBOARD.
_NAMES = re.compile(r"(^|_)(API_?KEY|KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?)(_|$)", re.IGNORECASE)
SHORTEST = 8  # characters; a shorter value would match ordinary text


def secrets_of(environment: Mapping[str, str]) -> dict[str, str]:
    """Values of variables with names of secrets, each with its variable's name. Paths do not count as secrets."""
    return {
        value: name
        for name, value in environment.items()
        if _NAMES.search(name) and len(value) >= SHORTEST and not value.startswith(("/", "~", "./"))
    }


def without_secrets(text: str, environment: Mapping[str, str]) -> str:
    """Replaces every secret of the environment by <name of its variable>; longest first, as one may contain another."""
    for value, name in sorted(secrets_of(environment).items(), key=lambda pair: -len(pair[0])):
        text = text.replace(value, f"<{name}>")  # by value, wherever it appears
    return text
