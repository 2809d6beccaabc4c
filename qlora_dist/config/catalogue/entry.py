"""What a catalogued error is made of."""

from dataclasses import dataclass
from string import Formatter

from qlora_dist.config.catalogue.facts import first_line

Fact = str | int | float


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


def plain_facts(facts: dict[str, object]) -> dict[str, Fact]:
    """Facts as numbers and texts of one line, which JSON holds; of an exception the first line of what it says."""
    return {name: _plain(value) for name, value in facts.items()}


def _plain(value: object) -> Fact:
    if isinstance(value, int | float):
        return value
    if isinstance(value, BaseException):
        return first_line(value)
    return " ".join(line.strip() for line in str(value).splitlines())
