"""Read YAML with the scalars of YAML 1.2; refuse duplicate keys, aliases and tags.

PyYAML reads YAML 1.1: there `2e-4` is text, `010` is 8, `no` is False and the last of equal keys
wins.
"""

import re

import yaml


def load(text: str) -> object:
    """Parse one document; raises `ValueError` with the reason, the place and the line itself."""
    try:
        return yaml.load(text, Loader=_StrictLoader)  # a SafeLoader, only stricter
    except (yaml.YAMLError, RecursionError, ValueError, TypeError) as error:
        raise ValueError(_reason(error)) from error


def _reason(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return " ".join(str(error).split())
    problem = str(getattr(error, "problem", ""))
    if "'\\t'" in problem or mark.buffer[mark.pointer : mark.pointer + 1] == "\t":
        problem += " (a tab: indent with spaces)"
    place = f"line {mark.line + 1}, column {mark.column + 1}: {problem}"
    return f"{place}\n{mark.get_snippet(indent=2)}" if mark.buffer else place


def dump(value: object) -> str:
    """Write a document that `load` and `yaml.safe_load` both read back unchanged."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)


class _StrictLoader(yaml.SafeLoader):
    # empty, and filled below: PyYAML's own resolvers are those of YAML 1.1
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.events.AliasEvent):
            # A few aliases of aliases can expand to more than fits into memory.
            raise yaml.YAMLError("aliases (*name) are not allowed")
        if getattr(self.peek_event(), "tag", None):
            raise yaml.YAMLError("tags (!name) are not allowed")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        # PyYAML would keep the last of equal keys and say nothing.
        seen: set[str] = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise yaml.YAMLError(
                    f"duplicate key {key_node.value!r} (line {key_node.start_mark.line + 1})"
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)", "tTfF"),
    ("null", r"(?:~|null|Null|NULL|)", ["~", "n", "N", ""]),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?",
        "-+.0123456789",
    ),
):
    _StrictLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(rf"{_pattern}\Z"), list(_first)
    )


class _Dumper(yaml.SafeDumper):
    """Quote strings that one of the two loaders would take for something else, such as `1e5`."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    resolvers = _StrictLoader.yaml_implicit_resolvers.get(text[:1], [])
    style = "'" if any(pattern.match(text) for _, pattern in resolvers) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
