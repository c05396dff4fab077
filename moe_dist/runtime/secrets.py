"""Removes secrets of the environment from text before it is logged or stored.

moe_dist writes only those environment variables to logs or files that it reads itself. But an exception may quote a URL
that contains a key, and a user may pass a key as an override. The values of secret variables are therefore removed from all
texts before they are logged or stored.
"""

import re
from collections.abc import Mapping

# Words that mark the names of secret variables, as in WANDB_API_KEY, HF_TOKEN and AWS_SECRET_ACCESS_KEY. They must not
# match in TOKENIZERS_PARALLELISM or KEYBOARD.
_NAMES = re.compile(r"(^|_)(API_?KEY|KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?)(_|$)", re.IGNORECASE)
SHORTEST = 8  # smallest number of characters of a secret; a shorter value would match ordinary text


def secrets_of(environment: Mapping[str, str]) -> dict[str, str]:
    """Maps each secret value in the environment to its variable. A value is secret if its variable's name contains a word
    such as KEY or TOKEN, it has at least `SHORTEST` characters, and it is not a path."""
    return {
        value: name
        for name, value in environment.items()
        if _NAMES.search(name) and len(value) >= SHORTEST and not value.startswith(("/", "~", "./"))
    }


def without_secrets(text: str, environment: Mapping[str, str]) -> str:
    """Replaces every secret of the environment by its variable's name, as in <HF_TOKEN>. Longer values are replaced first,
    because one secret may contain another."""
    for value, name in sorted(secrets_of(environment).items(), key=lambda pair: -len(pair[0])):
        text = text.replace(value, f"<{name}>")
    return text
