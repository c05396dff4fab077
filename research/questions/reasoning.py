"""Makes facts with short answers by the optional package reasoning-gym."""

import re

from moe_dist.inference.fact import Fact

# Generators of short questions with one short text as answer. Each generator makes thousands of questions within seconds.
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
    """Returns facts from the distinct questions among the first `SIZE` questions of the generator `name`.

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
    """Returns the key that decides whether a fact is for training or held out: the numbers in the question `asked`, sorted
    and without signs. So 6 * 7 and 7 * 6 are on the same side. The key of a question without numbers is the question."""
    numbers = sorted(re.findall(r"\d+", asked), key=int)
    return f"{name}:{' '.join(numbers) or asked}"
