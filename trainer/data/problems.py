"""The problems of a training file: one a line, all counted, the first few kept. Knows no JSON, no tokens."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from adapters_store.errors import InputRefused
from adapters_store.parsing.strict_json import shown

MAX_LISTED = 20
MAX_EXCERPT_CHARACTERS = 60


@dataclass(frozen=True)
class Problem:
    """line: from 1; 0 is the file as a whole. code: stable. excerpt: what is wrong, in ASCII. param: the field."""

    line: int
    code: str
    message: str
    excerpt: str = ""
    param: str = ""

    def __str__(self) -> str:
        where = f"line {self.line}: " if self.line else ""
        return f"{where}{self.message}" + (f" ({self.excerpt})" if self.excerpt else "")


class DataRejected(InputRefused):
    """The training data cannot be used. line, code: the first problem's.

    problems: the first ones found. counts: every problem found, by code. message: all of it in a few lines.
    """

    def __init__(
        self, problems: list[Problem], counts: dict[str, int] | None = None, *, what: str = "data", is_cut: bool = False
    ) -> None:
        """is_cut: reading ended at the last of them."""
        assert problems, "nothing to reject for"
        first = problems[0]
        self.problems = problems
        self.counts = counts or dict(Counter(problem.code for problem in problems))
        self.line = first.line
        self.num_problems = sum(self.counts.values())
        at_least = "at least " if is_cut else ""
        more = f" (and {at_least}{self.num_problems - 1} more problems)" if self.num_problems > 1 else ""
        super().__init__(first.code, f"{what}: {first}{more}", param=what)


class LineRefused(InputRefused):
    """Inside one line: raised by the parser, turned into a Problem where the line's number is known."""

    param: str

    def __init__(self, code: str, message: str, *, excerpt: str = "", param: str = "") -> None:
        super().__init__(code, message, param=param)
        self.excerpt = excerpt

    def at(self, line: int) -> Problem:
        return Problem(line, self.code, self.message, self.excerpt, self.param)


class ProblemList:
    """Collects problems of one file; a file that is wrong on every line costs no memory for it.

    listed: the first ones. counts: all of them, by code.
    """

    def __init__(self, *, what: str = "data", max_problems: int | None = None) -> None:
        self._what = what
        self._max_problems = max_problems
        self.listed: list[Problem] = []
        self.counts: Counter[str] = Counter()

    def add(self, problem: Problem) -> None:
        """Raises DataRejected at the last of max_problems."""
        self.counts[problem.code] += 1
        if len(self.listed) < MAX_LISTED:
            self.listed.append(problem)
        if self.counts.total() == self._max_problems:
            raise DataRejected(self.listed, dict(self.counts), what=self._what, is_cut=True)

    def raise_if_any(self) -> None:
        """Raises DataRejected."""
        if self.listed:
            raise DataRejected(self.listed, dict(self.counts), what=self._what)


def excerpt_of(value: object) -> str:
    """A value from outside, for an error message."""
    return shown(value, MAX_EXCERPT_CHARACTERS)


def excerpt_of_bytes(data: bytes) -> str:
    """The first bytes, as readable ASCII."""
    text = (
        data[:MAX_EXCERPT_CHARACTERS].decode("utf-8", "backslashreplace").encode("ascii", "backslashreplace").decode()
    )
    return "".join(character if character.isprintable() else " " for character in text)
