"""Reads YAML text; what is wrong in it becomes one sentence that says where."""

from collections.abc import Callable
from typing import Any

import yaml

from qlora_dist.config.errors import UserError

Where = Callable[[int], str]


def read_yaml(text: str, where: Where) -> tuple[Any, yaml.Node | None]:
    """The value of `text` and the node it was made from (None for an empty text).

    Args:
        where: names the place of a line (counted from 1), for the error's sentence.

    Raises:
        UserError: the text is not YAML, has a tag of its own, or a key that is written twice or is no plain value.
    """
    try:
        loader = _Loader(text, where)
        try:
            node = loader.get_single_node()
            return (loader.construct_document(node) if node is not None else None), node
        finally:
            loader.dispose()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        problem = f"YAML does not allow the character U+{error.character:04X}"
        raise UserError("config-not-yaml", where=where(line), problem=problem) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark is not None else 1
        problem = error.problem or error.context or "not valid YAML"
        raise UserError("config-not-yaml", where=where(line), problem=problem) from None
    except RecursionError:
        raise UserError("config-not-yaml", where=where(1), problem="nested too deeply") from None


class _Loader(yaml.SafeLoader):
    """A SafeLoader that refuses a key written twice, which YAML would silently let win."""

    def __init__(self, text: str, where: Where):
        super().__init__(text)
        self._where = where

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except ValueError as error:
            # Such as 2001-13-45: by its look a date for YAML, and none for Python.
            problem = f"{node.value} without quotes is no text, and no date or number either ({error})"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            where = self._where(key_node.start_mark.line + 1)
            if not isinstance(key_node, yaml.ScalarNode):
                raise UserError("config-key-no-name", where=where)
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise UserError("config-key-twice", where=where, key=key)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def refuse_tag(self, node: yaml.Node) -> None:
        """A tag that SafeLoader does not know, such as `!!python/object` or `!include`."""
        tag = node.tag.replace("tag:yaml.org,2002:", "!!")
        raise UserError("config-tag", where=self._where(node.start_mark.line + 1), tag=tag)


_Loader.add_constructor(None, _Loader.refuse_tag)
