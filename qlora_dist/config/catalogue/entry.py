"""What a catalogued error is made of."""

from collections.abc import Iterator
from dataclasses import dataclass
from string import Formatter


@dataclass(frozen=True)
class Mendable:
    """An error that a person can mend.

    sentence: what is wrong, naming the field, file or line; `{fact}` stands for what is known at the time.
    mend: what to do about it, in the imperative.
    """

    sentence: str
    mend: str

    @property
    def facts(self) -> set[str]:
        """The names of the facts that both texts need."""
        return {name for _, name, _, _ in Formatter().parse(self.sentence + self.mend) if name is not None}

    def told(self, **facts: object) -> str:
        """The one sentence that a person gets.

        Raises:
            KeyError: a fact is missing.
        """
        plain = plain_facts(facts)
        return f"{self.sentence.format(**plain)}; {self.mend.format(**plain)}"


def plain_facts(facts: dict[str, object]) -> dict[str, str | int | float]:
    """Facts as numbers and one-line texts, which JSON holds; an exception is what it says, without its full stop."""
    return dict(_plain(facts))


def _plain(facts: dict[str, object]) -> Iterator[tuple[str, str | int | float]]:
    for name, value in facts.items():
        if isinstance(value, int | float):
            yield name, value
        else:
            text = " ".join(line.strip() for line in str(value).splitlines())
            if isinstance(value, BaseException):
                text = text.rstrip(". ") or type(value).__name__
            yield name, text
