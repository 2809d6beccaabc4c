"""The catalogue of errors: what is raised is in it, what is in it is raised, and the page shows it."""

import ast
import json
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from string import Formatter

import pytest

import qlora_dist
from qlora_dist.config.catalogue import AREAS, CATALOGUE
from qlora_dist.config.catalogue.__main__ import errors_page, shown
from qlora_dist.config.catalogue.entry import Mendable
from qlora_dist.config.errors import UserError

PACKAGE = Path(qlora_dist.__file__).parent
REPOSITORY = PACKAGE.parent


def trees() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield str(path.relative_to(REPOSITORY)), ast.parse(path.read_text(encoding="utf-8"))


def error_classes() -> set[str]:
    """UserError and the names of the classes made from it."""
    classes = {"UserError"}
    for _, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and any(isinstance(b, ast.Name) and b.id in classes for b in node.bases):
                classes.add(node.name)
    return classes


def raised() -> list[tuple[str, ast.Call]]:
    """Every place that makes such an error, and its call; `config/errors.py` makes again what was made before."""
    classes = error_classes()
    return [
        (f"{name}:{node.lineno}", node)
        for name, tree in trees()
        if name != "qlora_dist/config/errors.py"
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in classes
    ]


def code_of(call: ast.Call) -> str | None:
    first = call.args[0] if call.args else None
    return first.value if isinstance(first, ast.Constant) and isinstance(first.value, str) else None


def some_facts(entry: Mendable) -> dict[str, object]:
    """A value for each fact: a number where the text formats one."""
    fields = Formatter().parse(entry.sentence + entry.mend)
    return {name: 7 if spec else "something" for _, name, spec, _ in fields if name is not None}


def test_every_error_raised_is_in_the_catalogue_with_exactly_its_facts() -> None:
    wrong = []
    for place, call in raised():
        code, given = code_of(call), {keyword.arg for keyword in call.keywords}
        if code is None or code not in CATALOGUE:
            wrong.append(f"{place}: {ast.unparse(call)[:80]} has no code of the catalogue, written out")
        elif given != CATALOGUE[code].facts:
            wrong.append(f"{place}: {code} needs {sorted(CATALOGUE[code].facts)} and gets {sorted(map(str, given))}")
    assert not wrong, "\n".join(wrong)


def test_every_error_of_the_catalogue_is_raised_somewhere() -> None:
    assert {code_of(call) for _, call in raised()} >= set(CATALOGUE)


def test_no_code_stands_in_two_areas() -> None:
    assert sum(map(len, AREAS.values())) == len(CATALOGUE)


@pytest.mark.parametrize("code", CATALOGUE)
def test_each_error_is_one_sentence_with_its_mend(code: str) -> None:
    entry = CATALOGUE[code]
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", code)
    for text in (entry.sentence, entry.mend):
        assert text.strip() == text != ""
        assert not text.endswith((".", ";", ",")), "the parts are joined by a semicolon, and end without a full stop"
        assert not re.search(r"\. [A-Z]", text), "one sentence"
        assert not any(mark in text for mark in ("\n", "  ", ".;", ";;"))
    message = UserError(code, **some_facts(entry)).message
    assert message == entry.told(**some_facts(entry))
    assert "\n" not in message
    assert len(message) < 500


def test_it_crosses_between_processes_as_it_is() -> None:
    error = UserError("event-log-locked", path=Path("/runs/a"), seconds=30.0, holder="process 7 on host b")
    for copy in (pickle.loads(pickle.dumps(error)), UserError.from_dict(json.loads(json.dumps(error.to_dict())))):
        assert type(copy) is UserError
        assert (copy.code, copy.facts, copy.message) == (error.code, error.facts, error.message)
        assert str(copy) == "/runs/a has been locked for 30 s by process 7 on host b, which may be stopped; " + (
            "end that process and run the same command again"
        )


def test_facts_are_put_on_one_line_and_lose_their_secrets() -> None:
    several_lines = ValueError("what another library says.\nAnd then explains.")
    assert "(what another library says);" in UserError("report-not-writable", error=several_lines).message
    assert UserError("no-run", folder="a\n  b").message.startswith("there is no run in a b; ")
    assert "s3://***@bucket" in UserError("no-run", folder="s3://me:secret@bucket").message


def test_a_fact_or_code_that_is_missing_is_a_mistake_of_ours() -> None:
    with pytest.raises(KeyError, match="folder"):
        UserError("no-run")
    with pytest.raises(KeyError, match="no such code"):
        UserError("no such code")


def test_the_page_is_up_to_date() -> None:
    command = [sys.executable, "-m", "qlora_dist.config.catalogue"]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, cwd=REPOSITORY).stdout
    assert printed == errors_page()
    assert printed == (REPOSITORY / "docs" / "errors.md").read_text(encoding="utf-8"), "run: make docs"


def test_the_page_shows_each_error_legibly() -> None:
    page = errors_page()
    for code in CATALOGUE:
        assert page.count(f"\n### {code}\n") == 1
    code_spans = re.findall(r"`[^`\n]*`", page)
    assert not [span for span in code_spans if "*" in span and "*." not in span], "a fact in them is not in italics"
    assert (
        shown("`{key}` of <x> is {max_steps!r}: 'a: {{b}}', `<*>`") == r"*key* of \<x> is *max steps*: 'a: {b}', `<*>`"
    )
