"""Problems of five levels, their worked solutions, and sets of them that do not overlap.

A problem of level L has L + 1 digits joined by ``+``, ``-`` and ``*``, worked from left to right, modulo ten::

    Mod ten, left to right: 4+4*7=   ->   4+4=8; 7*8=6; \\boxed{6}

Each step of a solution is written in one of three styles at random: a model trained on solutions is unsure at the
start of a step and nowhere else, so its entropy has the few high positions that SEAD's zone C is about.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator
from dataclasses import dataclass

LEVELS = (1, 2, 3, 4, 5)
OPERATORS = "+-*"
STYLES = ("plain", "swapped", "short")
STYLE_SHARES = (50, 25, 25)  # percent


@dataclass(frozen=True)
class Problem:
    """A chain of single-digit operations."""

    digits: tuple[int, ...]
    operators: tuple[str, ...]  # one fewer than the digits

    @property
    def level(self) -> int:
        return len(self.operators)

    @property
    def prompt(self) -> str:
        rest = zip(self.operators, self.digits[1:], strict=True)
        return f"Mod ten, left to right: {self.digits[0]}{''.join(f'{operator}{digit}' for operator, digit in rest)}="

    @property
    def answer(self) -> int:
        return list(self._results())[-1]

    def solution(self, styles: random.Random) -> str:
        """The worked solution, ending in the boxed answer; ``styles`` chooses how each step is written."""
        accumulator, steps = self.digits[0], []
        for operator, digit, result in zip(self.operators, self.digits[1:], self._results(), strict=True):
            (style,) = styles.choices(STYLES, STYLE_SHARES)
            steps.append(f"{_step(style, accumulator, operator, digit)}={result}; ")
            accumulator = result
        return f"{''.join(steps)}\\boxed{{{accumulator}}}"

    def _results(self) -> Iterator[int]:
        """The value after each operation."""
        value = self.digits[0]
        for operator, digit in zip(self.operators, self.digits[1:], strict=True):
            match operator:
                case "+":
                    value = (value + digit) % 10
                case "-":
                    value = (value - digit) % 10
                case "*":
                    value = (value * digit) % 10
            yield value


def _step(style: str, accumulator: int, operator: str, digit: int) -> str:
    """The left-hand side of one step: what came before, the operator, the next digit."""
    match style:
        case "plain":
            return f"{accumulator}{operator}{digit}"
        case "swapped":
            return f"-{digit}+{accumulator}" if operator == "-" else f"{digit}{operator}{accumulator}"
        case _:
            return f"{operator}{digit}"  # short: the value so far is understood


@dataclass(frozen=True)
class ProblemSets:
    """Prompts to distil on and problems to measure on; supervised training sees neither."""

    pool: list[Problem]
    heldout: list[Problem]

    @property
    def reserved(self) -> frozenset[Problem]:
        return frozenset(self.pool) | frozenset(self.heldout)


def draw_problem(rng: random.Random, level: int) -> Problem:
    """A problem of ``level``, uniform over all of them."""
    digits = tuple(rng.randrange(10) for _ in range(level + 1))
    return Problem(digits, tuple(rng.choice(OPERATORS) for _ in range(level)))


def draw_problems(rng: random.Random, level: int, count: int, exclude: Collection[Problem]) -> list[Problem]:
    """``count`` different problems of ``level``, none of them in ``exclude``.

    Raises ValueError if the level does not have so many.
    """
    total = 10 ** (level + 1) * len(OPERATORS) ** level
    left = total - sum(problem.level == level for problem in exclude)
    if count > left:
        raise ValueError(f"level {level} has {left} problems left of {total}: {count} are too many")
    drawn: dict[Problem, None] = {}  # a set that keeps its order
    while len(drawn) < count:
        problem = draw_problem(rng, level)
        if problem not in exclude:
            drawn[problem] = None
    return list(drawn)


def make_problem_sets(seed: int, pool_size: int, heldout_per_level: int) -> ProblemSets:
    """The sets that belong to ``seed``; ``pool_size`` problems in equal parts, as far as level 1 reaches.

    Level 1 has 300 problems: it gives at most a third of them to the pool, so that supervised training has some too.

    Raises ValueError if level 1 does not have ``heldout_per_level`` problems beside those of the pool.
    """
    rng = random.Random(f"problem sets {seed}")
    heldout = [
        problem for level in LEVELS for problem in draw_problems(rng, level, heldout_per_level, exclude=frozenset())
    ]
    excluded = frozenset(heldout)
    pool: list[Problem] = []
    for level in LEVELS:
        share = (pool_size - len(pool)) // (LEVELS[-1] - level + 1)
        pool += draw_problems(rng, level, min(share, 100) if level == 1 else share, exclude=excluded)
    rng.shuffle(pool)
    return ProblemSets(pool, heldout)
