"""Questions with short answers that reasoning-gym makes up, by name and seed. The package is optional."""

import re

from moe_dist.inference.questions.fact import Fact

# Whose question and answer are short, whose answer is one string, and which make thousands in seconds.
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
    """The distinct questions among the first `SIZE` of a generator; wrong answers are those of other questions.

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
    """What decides a question's side: its numbers in whatever order and with whatever sign, so that 6 * 7 and 7 * 6 stand
    on one; its text where there are none."""
    numbers = sorted(re.findall(r"\d+", asked), key=int)
    return f"{name}:{' '.join(numbers) or asked}"
