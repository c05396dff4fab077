"""Makes facts with short answers. Uses the optional package reasoning-gym."""

import re

from moe_dist.inference.fact import Fact

# These generators make short questions that have one short text as the answer. Each makes thousands within seconds.
GENERATORS = (
    "basic_arithmetic",
    "chain_sum",
    "count_bits",
    "fraction_simplification",
    "gcd",
    "lcm",
    "letter_counting",
    "number_sequence",
    "products",
    "simple_equations",
)
SIZE = 2000


def reasoning(name: str, *, seed: int) -> list[Fact]:
    """Makes the first `SIZE` questions of the generator `name`, and returns the distinct questions among them as facts.

    Raises:
        ModuleNotFoundError: reasoning-gym is not installed.
    """
    import reasoning_gym  # pyright: ignore[reportMissingImports]

    made = reasoning_gym.create_dataset(name, size=SIZE, seed=seed)
    facts = {}
    for number in range(SIZE):
        item = made[number]
        asked = str(item["question"]).strip()
        facts.setdefault(asked, Fact(str(number), asked, str(item["answer"]), frozenset({key_of(name, asked)})))
    return list(facts.values())


def key_of(name: str, asked: str) -> str:
    """Returns the key that decides whether a fact is for training or held out. It has the numbers in the question `asked`,
    sorted and without signs, so that 6 * 7 and 7 * 6 are on the same side. Without numbers, the key is the question."""
    numbers = sorted(re.findall(r"\d+", asked), key=int)
    return f"{name}:{' '.join(numbers) or asked}"
