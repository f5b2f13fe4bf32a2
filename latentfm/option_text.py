"""Options as people write them: a YAML or JSON file, and overrides "section.key=value", each value read by the type of what it is for.

Where an option is a text, its text is taken as it stands: "pics #2", "null", "@home" and "2026-03-01" are names. Everything else is YAML.
What a file says is bounded before it is believed: its size, its depth, and what its aliases unfold to.
"""

import json
import re
import types
from collections.abc import Sequence
from contextlib import suppress
from itertools import accumulate
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

from latentfm.errors import InputError, nearest
from latentfm.files import CONTENT_ERRORS, Refused, own_json
from latentfm.words import is_text, shown

MOST_BYTES = 2**20  # of a file of options
MOST_VALUES, DEEPEST = 50_000, 40  # of what it holds, aliases unfolded
Kind = Any  # a type annotation


# Types


def choices(kind: Kind) -> list[Kind]:
    """The types of a union, a single one as a list; None is none."""
    if get_origin(kind) is Annotated:
        return choices(get_args(kind)[0])
    if get_origin(kind) in (Union, types.UnionType):
        return [each for part in get_args(kind) for each in choices(part)]
    return [] if kind is types.NoneType else [kind]


def is_model(kind: Kind) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def within(kind: Kind, key: Any) -> Kind:
    """The type of what a mapping or list of type `kind` holds under `key`; Any where it is not known."""
    for each in choices(kind):
        arguments = [part for part in get_args(each) if part is not Ellipsis]
        if is_model(each) and key in each.model_fields:
            return each.model_fields[key].annotation
        if get_origin(each) is dict:
            return arguments[1]
        if get_origin(each) in (list, tuple) and isinstance(key, int):
            return arguments[min(key, len(arguments) - 1)]
    return Any


def takes_text(kind: Kind) -> bool:
    """Whether a plain word of this type is a text, whatever YAML would make of it."""
    return str in choices(kind)


def takes_text_alone(kind: Kind) -> bool:
    """Whether nothing but a text is of this type."""
    return choices(kind) == [str]


# YAML and JSON


def parse(text: str, kind: Kind) -> Any:
    """The value that a YAML or JSON text holds, its texts as they are written where `kind` has texts.

    Raises Refused for what is neither, repeats a key, is nested too deeply, or unfolds to too much.
    """
    try:
        if text.lstrip()[:1] == "{" or (text[:1] == "[" and "\\u" in text):  # JSON, whose letters beyond 16 bits are two of YAML's
            with suppress(json.JSONDecodeError):
                return own_json(text)
        check_size(text)
        node = yaml.compose(text, yaml.SafeLoader)
        return None if node is None else built(node, kind)
    except RecursionError:
        raise Refused("is nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a number of more digits than Python reads
        raise error if isinstance(error, Refused) else Refused(f"is not valid YAML: {' '.join(str(error).split())}") from None


def check_size(text: str) -> None:
    """Raises Refused for YAML that is too deep, refers to itself, or holds too much once its aliases are unfolded."""
    sizes, names, anchors, total = [0], [None], {}, 0
    for event in yaml.parse(text, yaml.SafeLoader):
        size = 0
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in names:
                raise Refused(f"refers, by *{shown(event.anchor, 60)} in line {event.start_mark.line + 1}, to what that is part of")
            size = anchors.get(event.anchor, 1)
        elif isinstance(event, yaml.ScalarEvent):
            size = 1
            anchors[event.anchor] = size
        elif isinstance(event, yaml.CollectionStartEvent):
            sizes.append(1)
            names.append(event.anchor)
        elif isinstance(event, yaml.CollectionEndEvent):
            size, anchor = sizes.pop(), names.pop()
            anchors[anchor] = size
        sizes[-1] += size
        total = sum(sizes)
        if len(sizes) > DEEPEST:
            raise Refused(f"is nested more than {DEEPEST} deep")
        if total > MOST_VALUES:
            raise Refused(f"holds more than {MOST_VALUES:,} values, aliases unfolded; options are a few hundred")


def built(node: yaml.Node, kind: Kind) -> Any:
    """The value of a YAML node, whose texts are as they are written where `kind` has texts."""
    if isinstance(node, yaml.ScalarNode):
        standard = node.tag.startswith("tag:yaml.org,2002:")
        if takes_text(kind) and standard and not node.tag.endswith((":null", ":binary")):
            return node.value
        return number_or_text(node)
    if isinstance(node, yaml.SequenceNode):
        check_tag(node, "seq")
        return [built(part, within(kind, number)) for number, part in enumerate(node.value)]
    found = {}
    for key_node, value in pairs_of(node):
        key = key_of(key_node, kind)
        found[key] = built(value, within(kind, key))
    return found


def number_or_text(node: yaml.ScalarNode) -> Any:
    """What YAML makes of a plain value, but for its octal and sexagesimal numbers: 010 and 1:30 stay text, for the option to judge."""
    octal = node.tag.endswith(":int") and not re.fullmatch(r"[-+]?(0|[1-9][0-9]*)", node.value)
    if octal or (node.tag.endswith(":float") and ":" in node.value):
        return node.value
    try:
        return yaml.constructor.SafeConstructor().construct_object(node, deep=True)
    except CONTENT_ERRORS:  # "!!bool x": PyYAML believes a tag that is written, and reads on
        name, line = node.tag.rpartition(":")[2], node.start_mark.line + 1
        raise Refused(f"is not valid YAML: '{shown(node.value, 60)}' in line {line} cannot be read as {name}") from None


def check_tag(node: yaml.Node, name: str) -> None:
    if node.tag != f"tag:yaml.org,2002:{name}":
        raise Refused(f"is not valid YAML of plain values: {shown(node.tag, 60)} in line {node.start_mark.line + 1}")


def pairs_of(node: yaml.MappingNode) -> list[tuple[yaml.ScalarNode, yaml.Node]]:
    """The keys and values of a mapping, those that it merges by "<<" first, so that what is given here goes over them.

    Raises Refused for a key that is given twice, or is no single word, and for a merge of what is no mapping.
    """
    check_tag(node, "map")
    own, merged, seen = [], [], set()
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise Refused(f"is not valid YAML of options: the name in line {line} is no single word")
        if key.value in seen:
            raise Refused(f"gives '{shown(key.value, 60)}' twice, again in line {line}; leave one of them out")
        seen.add(key.value)
        if not key.tag.endswith(":merge"):
            own.append((key, value))
            continue
        for part in reversed(value.value) if isinstance(value, yaml.SequenceNode) else [value]:  # the first goes over the others
            if not isinstance(part, yaml.MappingNode):
                raise Refused(f"is not valid YAML of options: what '<<' in line {line} merges is no mapping")
            merged += pairs_of(part)
    return merged + own


def key_of(node: yaml.ScalarNode, kind: Kind) -> Any:
    """The key of a mapping of this type: a number where its keys are numbers, else the text as it is written."""
    if any(get_origin(each) is dict and get_args(each)[0] is int for each in choices(kind)) and node.tag.endswith(":int"):
        return number_or_text(node)
    return node.value


# Overrides


def meant(value: Any, kind: Kind) -> Any:
    """A value as an option of this type has it: a name of a choice in that one's letters, "1e3" as the whole number; else as it is.

    What a list or a mapping holds too, but for a section of options. Raises ValueError for a truth value in a number's place.
    """
    kinds = choices(kind)
    if isinstance(value, list):
        return [meant(part, within(kind, number)) for number, part in enumerate(value)]
    if isinstance(value, dict) and not any(is_model(each) for each in kinds):
        return {key: meant(part, within(kind, key)) for key, part in value.items()}
    if isinstance(value, bool) and bool not in kinds and (int in kinds or float in kinds):  # which would pass for 0 or 1
        raise ValueError("should be a number; yes, on and true, no, off and false are none")
    if not isinstance(value, str) or takes_text(kind):
        return value
    for each in kinds:
        if get_origin(each) is Literal:
            same = [name for name in get_args(each) if isinstance(name, str) and name.casefold() == value.casefold()]
            if same:
                return same[0]
        if each is int and re.fullmatch(r"[+-]?[0-9]{1,9}(\.[0-9]{1,9})?[eE]\+?[0-9]", value) and float(value).is_integer():
            return int(float(value))
    return value


def put(data: dict[str, Any], kind: Kind, override: str, again: bool = False) -> None:
    """Puts an override "section.key=value" into `data`, options of type `kind`, at any depth: train.adapter.rank=4, data.sources.0.path=a.

    again: an override gave this option before; a list then has the values of both.
    Raises InputError for a place that a list does not have, and for a value that is not valid YAML where one is needed.
    """
    name, _, text = override.partition("=")
    *places, last = name.strip().split(".")
    inner: Any = data
    for depth, place in enumerate(places):
        key, parent_kind, kind = key_in(inner, place, kind), kind, within(kind, key_in(inner, place, kind))
        if isinstance(inner, list) and key == len(inner):
            inner.append({})
        elif isinstance(inner, dict) and inner.get(key) is None:
            inner[key] = begun(parent_kind, kind, key)
        inner = inner[key]
        if not isinstance(inner, dict | list):
            what = "section" if depth == 0 else "option"
            raise InputError(f"{what} '{'.'.join(places[: depth + 1])}' should hold options, it holds {shown(repr(inner), 60)}")
    key = key_in(inner, last, kind)
    kind = within(kind, key)
    value = value_of(override, text, kind)
    if isinstance(inner, list) and key == len(inner):
        inner.append(value)
        return
    before = inner[key] if isinstance(inner, list) else inner.get(key)
    inner[key] = before + value if again and isinstance(value, list) and isinstance(before, list) else value


def begun(parent: Kind, kind: Kind, name: Any) -> Any:
    """What an override begins with that changes a part of an option not given yet: its default, or nothing in it."""
    fields = next((each.model_fields for each in choices(parent) if is_model(each)), {})
    default = fields[name].get_default(call_default_factory=True) if name in fields and not fields[name].is_required() else None
    if isinstance(default, dict | list | tuple):
        return dict(default) if isinstance(default, dict) else list(default)
    return [] if any(get_origin(each) in (list, tuple) for each in choices(kind)) else {}


def value_of(override: str, text: str, kind: Kind) -> Any:
    """What the text of an override means for an option of this type. Raises InputError."""
    if takes_text_alone(kind) or (takes_text(kind) and text[:1] not in "[{"):
        return text or None  # nothing leaves an option unset
    several = [within(each, 0) for each in choices(kind) if get_origin(each) in (list, tuple)]
    texts = any(takes_text(each) for each in several)  # a comma belongs to a text
    if several and text and text[:1] not in "[{":
        if texts:
            return [text]
        names = any(get_origin(each) is Literal for part in several for each in choices(part))
        text = f"[{text}]" if names or "," in text else text
    try:
        return parse(text, kind)
    except Refused as error:
        if (texts or takes_text(kind)) and closes_early(text):
            return text if takes_text(kind) else [text]
        raise InputError(f"the value of '{shown(override, 120)}' {shown(error, 200)}") from None


def closes_early(text: str) -> bool:
    """Whether the bracket that a text begins with is closed before its end, as in "[red] car"; "[a, b" is a list that lacks its end."""
    open_ones = accumulate((letter in "[{") - (letter in "]}") for letter in text.rstrip()[:-1])
    return 0 in open_ones


def key_in(inner: Any, place: str, kind: Kind) -> Any:
    """What `place` of a dotted name is in a mapping or a list. Raises InputError for a place that a list does not have."""
    listed = isinstance(inner, list)
    if not listed and not any(get_origin(each) is dict and get_args(each)[0] is int for each in choices(kind)):
        return place
    if not (place.isdecimal() and place.isascii() and len(place) < 10 and (not listed or int(place) <= len(inner))):
        place = shown(place, 60)
        raise InputError(f"'{place}' is no place in a list of {len(inner)}, counted from 0" if listed else f"'{place}' is no number")
    return int(place) if listed else {str(key): key for key in inner}.get(str(int(place)), int(place))  # JSON's "77" is 77


def unknown(kind: Kind, places: Sequence[str | int]) -> str:
    """What to say of a section or option, by its places from one of type `kind` on, that does not exist; the nearest is suggested."""
    for place in places[:-1]:
        kind = within(kind, place)
    known = next(each.model_fields for each in choices(kind) if is_model(each))
    path = shown(".".join(place for place in places if isinstance(place, str)), 120)
    what = "option" if len(places) > 1 else "section"
    return f"unknown {what} '{path}'{nearest(str(places[-1]), known)}; there are {', '.join(known)}"


def check_texts(value: Any, name: str) -> None:
    """Raises InputError for a text, at any depth, that no file, page or picture could hold."""
    if isinstance(value, dict):
        for key, part in value.items():
            check_texts(part, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for number, part in enumerate(value):
            check_texts(part, f"{name}.{number}")
    elif isinstance(value, str):
        if not is_text(value):
            raise InputError(f"{name} {shown(repr(value), 120)} is not valid UTF-8; rename it, or write it in UTF-8")
        if "\0" in value:
            raise InputError(f"{name} {shown(repr(value), 120)} holds a zero byte; leave it out")
