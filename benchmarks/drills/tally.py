"""Counts of a drill: what was tried, what held, what failed."""

from __future__ import annotations

import argparse
import random
from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Tally:
    """What became of the attempts of one drill."""

    name: str
    outcomes: Counter[str] = field(default_factory=Counter)
    """Attempts that held, by how they did."""
    failures: list[str] = field(default_factory=list)

    def held(self, how: str) -> None:
        """Count an attempt that did what is promised."""
        self.outcomes[how] += 1

    def failed(self, what: str) -> None:
        """Count one that did not."""
        self.failures.append(what)

    def report(self) -> int:
        """Print the counts and the failures; the exit code."""
        held = self.outcomes.total()
        print(f"{self.name}: tried {held + len(self.failures)}, held {held}, failed {len(self.failures)}")
        for how, count in sorted(self.outcomes.items()):
            print(f"  held: {count} {how}")
        for failure in self.failures:
            print(f"  failed: {failure}")
        return 1 if self.failures else 0


def arguments(what: str, count: int) -> tuple[random.Random, int]:
    """Random numbers and the number of attempts from the command line; `count` is the default."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=count)
    given = parser.parse_args()
    return random.Random(given.seed), given.count
