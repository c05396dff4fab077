"""Secrets that a process was given in its environment, kept out of what it writes.

Nothing of ours writes the environment anywhere. What is left are others' messages (an exception of a client that quotes a
URL with its key) and users' own slips (a key as an override): those are found by value.
"""

import re
from collections.abc import Mapping

# Whole words of a variable's name: WANDB_API_KEY, HF_TOKEN, AWS_SECRET_ACCESS_KEY; not TOKENIZERS_PARALLELISM or KEYBOARD.
_NAMES = re.compile(r"(^|_)(API_?KEY|KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?)(_|$)", re.IGNORECASE)
SHORTEST = 8  # characters; a shorter value would be found in innocent text


def secrets_of(environment: Mapping[str, str]) -> dict[str, str]:
    """Values of the variables that are named like secrets, each with its variable. A path is no secret; its file may be."""
    return {
        value: name
        for name, value in environment.items()
        if _NAMES.search(name) and len(value) >= SHORTEST and not value.startswith(("/", "~", "./"))
    }


def without_secrets(text: str, environment: Mapping[str, str]) -> str:
    """The text with every secret of the environment replaced by <the name of its variable>; the longest first."""
    for value, name in sorted(secrets_of(environment).items(), key=lambda pair: -len(pair[0])):
        text = text.replace(value, f"<{name}>")
    return text
