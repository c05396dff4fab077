"""Prints how fast this processor is, so that CI's times on two processors can be compared. 1.0 is the reference, an Intel
Xeon of 2.8 GHz. Measures CPU time of the interpreter, which most of CI's tests spend; needs no package."""

import time

REFERENCE_SECONDS = 0.55


def work() -> None:
    total = 0
    for number in range(6_000_000):
        total += number % 7
    values = {str(number): [number] * 8 for number in range(300_000)}
    assert sum(map(len, values.values())) == 2_400_000
    assert total > 0


def seconds() -> float:
    begun = time.process_time()
    work()
    return time.process_time() - begun


if __name__ == "__main__":
    best = min(seconds() for _ in range(5))
    print(f"processor: {REFERENCE_SECONDS / best:.2f} of the reference's speed ({best:.2f} s)", flush=True)
