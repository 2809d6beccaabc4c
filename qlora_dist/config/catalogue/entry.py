"""What a catalogued error is made of."""

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
        return f"{self.sentence.format(**facts)}; {self.mend.format(**facts)}"
