"""The bundled data set `home_commands`: every answer parses under the documented grammar, and no wording is shared."""

import json
import re
from collections import Counter
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

import qlora_dist.data

FOLDER = Path(qlora_dist.data.__file__).parent / "bundled"
MAX_FOUR_GRAM_OVERLAP = 0.25

DAY = r"(?:today|tomorrow|monday|tuesday|wednesday|thursday|friday|saturday|sunday|weekdays|weekend)"
ROOM = (
    r"(?:kitchen|bedroom|bathroom|living_room|office|hallway|garage|nursery|attic|cellar|dining_room|guest_room"
    r"|laundry_room|all)"
)
TIME = r"(?:[01]\d|2[0-3]):[0-5]\d"
COUNT = r"[1-9]\d*"
DECIMAL = r"[1-9]\d*(?:\.\d*[1-9])?"
PERCENT = r"(?:100|[1-9]?\d)"
DURATION = r"[1-9]\d*[ms]"
QUOTED = r'"[A-Za-z0-9](?:[A-Za-z0-9 \'-]*[A-Za-z0-9])?"'
UNIT = r"(?:km|mi|m|ft|cm|in|kg|lb|g|oz|l|gal)"

# Slots in the order they are written; True marks the ones that every answer has.
GRAMMAR: dict[str, list[tuple[str, str, bool]]] = {
    "alarm.set": [("time", TIME, True), ("day", DAY, False)],
    "timer.start": [("duration", DURATION, True)],
    "light.on": [("room", ROOM, True)],
    "light.off": [("room", ROOM, True)],
    "light.dim": [("room", ROOM, True), ("level", PERCENT, True)],
    "heat.set": [("room", ROOM, True), ("temp", DECIMAL, True)],
    "music.play": [("query", QUOTED, True), ("room", ROOM, False)],
    "music.volume": [("level", PERCENT, True)],
    "list.add": [("item", QUOTED, True), ("qty", COUNT, True)],
    "remind.add": [("task", QUOTED, True), ("day", DAY, False), ("time", TIME, False)],
    "message.send": [("to", QUOTED, True), ("text", QUOTED, True)],
    "event.add": [("title", QUOTED, True), ("day", DAY, True), ("time", TIME, True)],
    "weather.get": [("city", QUOTED, True), ("day", DAY, False)],
    "unit.convert": [("value", DECIMAL, True), ("from", UNIT, True), ("to", UNIT, True)],
}

# Words that only carry a slot's value: replaced by one placeholder before two wordings are compared.
VALUE_WORDS = frozenset(
    re.findall(
        r"\S+",
        """
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
    eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred dozen half quarter quarters noon
    am pm o'clock past morning afternoon evening second seconds minute minutes hour hours percent degrees
    today tomorrow tonight monday tuesday wednesday thursday friday saturday sunday
    kitchen bedroom bathroom living sitting lounge office study hallway corridor garage nursery baby's attic loft
    cellar basement dining guest spare laundry room
    kilometres miles metres feet centimetres inches kilograms pounds grams ounces litres gallons
    bottles cartons bags cans packs jars boxes bars loaves tubes
    """,
    )
)


def words(sentence: str) -> list[str]:
    return re.findall(r"#|\d+(?:[.:]\d+)?(?:am|pm)?|[a-z']+", sentence.lower())


def skeleton(sentence: str, answer: str) -> str:
    """The sentence's wording alone: numbers, times, days, rooms, units and the answer's quoted values become `#`."""
    text = sentence.lower()
    for value in sorted(re.findall(r'"([^"]*)"', answer.lower()), key=len, reverse=True):
        text = re.sub(rf"(?<!\w){re.escape(value)}(?!\w)", " # ", text)
    marked = ["#" if word in VALUE_WORDS or word[0].isdigit() else word for word in words(text)]
    joined = " ".join(marked)
    # "half past six in the morning" and "6:30" are one value each, and "on friday" is "tomorrow".
    joined = re.sub(r"\b(?:on|this) #", "#", joined)
    return re.sub(r"(?:\b(?:an?) )?#(?: (?:(?:and|an?|of|to|in|the) )*#)*", "#", joined)


@cache
def four_grams(sentence: str) -> frozenset[tuple[str, ...]]:
    split = words(sentence)
    return frozenset(tuple(split[i : i + 4]) for i in range(max(1, len(split) - 3)))


def four_gram_overlap(a: str, b: str) -> float:
    """Jaccard similarity of the two sentences' sets of word 4-grams; a shorter sentence counts as one gram."""
    left, right = four_grams(a), four_grams(b)
    return len(left & right) / len(left | right)


def answer_errors(answer: str) -> list[str]:
    """What the grammar has against an answer, one sentence each; empty for a valid one."""
    intent, *rest = answer.split(" ", 1)
    if intent not in GRAMMAR:
        return [f"unknown intent {intent!r}"]
    pattern = ""
    for key, value, required in GRAMMAR[intent]:
        pattern += rf" {key}={value}" if required else rf"(?: {key}={value})?"
    tail = f" {rest[0]}" if rest else ""
    errors = [] if re.fullmatch(pattern, tail) else [f"{answer!r} does not match {pattern!r}"]
    if intent == "unit.convert" and not errors:
        units = re.findall(r"(?:from|to)=(\w+)", answer)
        if units[0] == units[1]:
            errors.append(f"{answer!r} converts a unit to itself")
    return errors


def read(split: str) -> list[tuple[str, str]]:
    rows = []
    for line in (FOLDER / f"home_commands.{split}.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        assert list(row) == ["messages"], line
        assert [(list(m), m["role"]) for m in row["messages"]] == [
            (["role", "content"], "user"),
            (["role", "content"], "assistant"),
        ], line
        rows.append((row["messages"][0]["content"], row["messages"][1]["content"]))
    return rows


@pytest.fixture(scope="module")
def train() -> list[tuple[str, str]]:
    return read("train")


@pytest.fixture(scope="module")
def held_out() -> list[tuple[str, str]]:
    return read("eval")


def test_row_counts_are_those_the_readme_states(train: list[tuple[str, str]], held_out: list[tuple[str, str]]) -> None:
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert len(train) >= 480
    assert len(held_out) >= 80
    assert f"| `home_commands.train.jsonl` | {len(train)} |" in readme
    assert f"| `home_commands.eval.jsonl` | {len(held_out)} |" in readme


def test_the_readme_documents_this_grammar() -> None:
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    for intent, slots in GRAMMAR.items():
        (row,) = [line for line in readme.splitlines() if re.match(rf"\| .*`{re.escape(intent)}`.* \|", line)]
        written = " ".join(f"`{key}`" if required else f"[`{key}`]" for key, _, required in slots)
        assert row.endswith(f"| {written} |"), row
    examples = [line.split("    ") for line in readme.splitlines() if line.startswith("    ") and "=" in line]
    answers = [example[-1] for example in examples if "{" not in example[-1]]
    assert len(answers) == 3
    assert [answer_errors(answer) for answer in answers] == [[], [], []]


@pytest.mark.parametrize("split", ["train", "eval"])
def test_every_answer_parses(split: str) -> None:
    errors = [error for _, answer in read(split) for error in answer_errors(answer)]
    assert errors == []


@pytest.mark.parametrize(
    "answer",
    [
        "alarm.set time=6:30",
        "alarm.set time=24:00",
        "alarm.set day=tomorrow time=06:30",
        "alarm.set time=06:30 day=Friday",
        "alarm.set time=06:30 ",
        "alarm.stop time=06:30",
        "timer.start duration=10",
        "timer.start duration=1h",
        "light.on",
        "light.on room=lounge",
        "light.dim room=office level=101",
        "heat.set room=office temp=21.0",
        "list.add item=milk qty=1",
        'list.add item="milk"',
        'list.add item="" qty=1',
        'list.add item="milk " qty=1',
        "unit.convert value=5 from=km to=km",
        "unit.convert value=five from=km to=mi",
    ],
)
def test_the_grammar_refuses(answer: str) -> None:
    assert answer_errors(answer) != []


@pytest.mark.parametrize("split", ["train", "eval"])
def test_user_sentences_are_clean_and_quoted_values_are_the_users_words(split: str) -> None:
    rows = read(split)
    assert len({user for user, _ in rows}) == len(rows)
    for user, answer in rows:
        assert user == " ".join(user.split()), user
        assert not re.search(r"[{}|\[\]]", user), user
        for value in re.findall(r'"([^"]*)"', answer):
            assert value in user or value[0].upper() + value[1:] in user, (user, value)


@pytest.mark.parametrize("split", ["train", "eval"])
def test_values_said_in_digits_are_those_of_the_answer(split: str) -> None:
    """`7:40pm` is 19:40 and `40 minutes` is 40m: the normalisation of the answers, recomputed for digit spellings."""
    checked = 0
    for user, answer in read(split):
        for hour, minute, pm in re.findall(r"(?<![\d:])(\d{1,2})(?::(\d\d))? ?(am|pm)\b", user):
            clock = f"{int(hour) % 12 + 12 * (pm == 'pm'):02}:{int(minute or 0):02}"
            assert f"time={clock}" in answer, (user, answer)
            checked += 1
        for number, unit in re.findall(r"^(?!.*an hour and).*?\b(\d+) (minute|second|hour)", user):
            seconds_or_minutes = {"minute": f"{number}m", "second": f"{number}s", "hour": f"{int(number) * 60}m"}
            assert answer == f"timer.start duration={seconds_or_minutes[unit]}", (user, answer)
            checked += 1
        for number in re.findall(r"(\d+) ?(?:%|percent)", user):
            assert answer.endswith(f"level={number}"), (user, answer)
            checked += 1
        for number in re.findall(r"(\d+(?:\.5)?) degrees", user):
            assert answer.endswith(f"temp={number}"), (user, answer)
            checked += 1
    assert checked >= 10


def test_intents_are_balanced_and_mixed(train: list[tuple[str, str]], held_out: list[tuple[str, str]]) -> None:
    for rows in (train, held_out):
        intents = [answer.split(" ")[0] for _, answer in rows]
        counts = Counter(intents)
        assert set(counts) == set(GRAMMAR)
        assert max(counts.values()) <= 4 * min(counts.values())
        repeats = sum(a == b for a, b in pairwise(intents))
        assert repeats <= 0.2 * len(intents)


def test_no_held_out_wording_occurs_in_training(train: list[tuple[str, str]], held_out: list[tuple[str, str]]) -> None:
    train_skeletons = {skeleton(user, answer) for user, answer in train}
    shared = [user for user, answer in held_out if skeleton(user, answer) in train_skeletons]
    assert shared == []


def test_held_out_sentences_are_unlike_every_training_sentence(
    train: list[tuple[str, str]], held_out: list[tuple[str, str]]
) -> None:
    """Twice: on the words as they stand, and on the wording with the values taken out."""
    skeletons = [skeleton(user, answer) for user, answer in train]
    for user, answer in held_out:
        wording = skeleton(user, answer)
        for (other, _), other_wording in zip(train, skeletons, strict=True):
            assert four_gram_overlap(user, other) < MAX_FOUR_GRAM_OVERLAP, (user, other)
            assert four_gram_overlap(wording, other_wording) < MAX_FOUR_GRAM_OVERLAP, (user, other)


def test_two_fillings_of_one_wording_have_one_skeleton() -> None:
    a = skeleton("Wake me at half past six tomorrow.", "alarm.set time=06:30 day=tomorrow")
    b = skeleton("Wake me at 7:15 on Friday.", "alarm.set time=07:15 day=friday")
    c = skeleton("Wake me at 7:15pm this Friday:", "alarm.set time=19:15 day=friday")
    assert a == b == c == "wake me at #"
    assert skeleton("Add six bottles of water.", 'list.add item="water" qty=6') == "add #"
    assert four_gram_overlap("put it on the list", "put it on the grocery list") == pytest.approx(1 / 4)
