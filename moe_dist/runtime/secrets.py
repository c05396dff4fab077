"""Removes secrets of the environment from text before it is logged or stored.

moe_dist writes only environment variables that it reads itself into logs or files. But an exception may quote a URL that
contains a key, and a user may pass a key as an override. The values of secret variables are therefore removed from texts
before they are logged or stored.
"""

import re
from collections.abc import Mapping

# Words in names of secret variables, such as WANDB_API_KEY, HF_TOKEN and AWS_SECRET_ACCESS_KEY. The names
# TOKENIZERS_PARALLELISM and KEYBOARD must not match.
_NAMES = re.compile(r"(^|_)(API_?KEY|KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?)(_|$)", re.IGNORECASE)
SHORTEST = 8  # characters; a shorter value would match ordinary text


def secrets_of(environment: Mapping[str, str]) -> dict[str, str]:
    """Maps each secret value of the environment to its variable. A value is secret if its variable's name contains a word
    such as KEY or TOKEN, and the value has at least `SHORTEST` characters and is no path."""
    return {
        value: name
        for name, value in environment.items()
        if _NAMES.search(name) and len(value) >= SHORTEST and not value.startswith(("/", "~", "./"))
    }


def without_secrets(text: str, environment: Mapping[str, str]) -> str:
    """Replaces every secret of the environment by its variable's name, as in <HF_TOKEN>. The longest value is replaced
    first, because one secret may contain another."""
    for value, name in sorted(secrets_of(environment).items(), key=lambda pair: -len(pair[0])):
        text = text.replace(value, f"<{name}>")
    return text
