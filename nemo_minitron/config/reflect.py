"""What a configuration class says of itself: its fields' names, types, values and documentation."""

import ast
import dataclasses
import inspect
import itertools
import typing
from typing import Any

from nemo_minitron.config import Config

_TYPE_NAMES = {
    Any: "anything",
    bool: "true or false",
    float: "a number",
    int: "a whole number",
    str: "text",
    type(None): "null",
}


def leaf_types(schema: type, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> annotation of every field that is not itself a group of fields."""
    types: dict[str, Any] = {}
    for name, annotation in typing.get_type_hints(schema).items():
        if dataclasses.is_dataclass(annotation):
            types |= leaf_types(typing.cast(type, annotation), f"{prefix}{name}.")
        else:
            types[f"{prefix}{name}"] = annotation
    return types


def leaf_values(config: Config, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> value of every field that is not itself a group of fields."""
    values: dict[str, Any] = {}
    for name, value in vars(config).items():
        values |= leaf_values(value, f"{prefix}{name}.") if isinstance(value, Config) else {f"{prefix}{name}": value}
    return values


def setting_docs(schema: type, prefix: str = "") -> dict[str, str]:
    """Dotted name -> description of every field: the string that stands under it in its class."""
    own = {name: text for base in reversed(schema.__mro__[:-1]) for name, text in _field_docs(base).items()}
    docs: dict[str, str] = {}
    for name, annotation in typing.get_type_hints(schema).items():
        if dataclasses.is_dataclass(annotation):
            docs |= setting_docs(typing.cast(type, annotation), f"{prefix}{name}.")
        else:
            docs[f"{prefix}{name}"] = own.get(name, "")
    return docs


def _field_docs(schema: type) -> dict[str, str]:
    """Name -> description of the fields that stand in the class itself."""
    (definition,) = ast.parse(inspect.getsource(schema)).body
    assert isinstance(definition, ast.ClassDef)
    return {
        field.target.id: " ".join(ast.literal_eval(text.value).split())
        for field, text in itertools.pairwise(definition.body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr)
    }


def shown(value: object) -> str:
    """A value as help and documentation show it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def describe_type(annotation: Any) -> str:
    """What a field takes, in words."""
    if annotation in _TYPE_NAMES:
        return _TYPE_NAMES[annotation]
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is list:
        return f"a list, each {describe_type(arguments[0])}"
    if typing.get_origin(annotation) is dict:
        return "a mapping {key:value}"
    return " or ".join(map(describe_type, arguments))
