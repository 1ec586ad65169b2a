"""The JSON schema of plan files, made from the dataclasses that read and write them.

`python -m dcc.plans.schema` prints it; plan.schema.json beside this file is what it printed.
"""

from __future__ import annotations

import json
import types
import typing
from dataclasses import fields
from typing import Any

from dcc.decisions import Decision
from dcc.plans.fields import required
from dcc.plans.forms import CORRECTORS, NO_RATIO, SELECTORS, TRANSFORMS, Form
from dcc.plans.kinds import kinds_of
from dcc.plans.plan import VERSION, Plan
from dcc.plans.predictors import RULES, Predictor, orders_of
from dcc.plans.triggers import Trigger

NAMES = {Form: "form", Predictor: "predictor", Trigger: "trigger"}


def plan_schema() -> dict[str, Any]:
    """The schema (draft 2020-12) that every file of `Plan.save` satisfies."""
    hints = typing.get_type_hints(Plan)
    properties = {f.name: schema_of(hints[f.name]) for f in fields(Plan)}
    decision = {"enum": [int(decision) for decision in Decision if decision != Decision.IDLE]}
    properties["schedule"] = {"type": "array", "items": {"type": "array", "items": decision}}
    properties["trigger"] = {"anyOf": [{"$ref": "#/$defs/trigger"}, {"type": "object", "maxProperties": 0}]}
    properties["forms"] = {
        "type": "array",
        "items": {"anyOf": [{"$ref": "#/$defs/form"}, {"type": "object", "maxProperties": 0}]},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "dcc plan",
        "type": "object",
        "properties": {"dcc_plan": {"const": VERSION}, **properties},
        "required": ["dcc_plan", *required(Plan)],
        "additionalProperties": False,
        "$defs": {"predictor": _predictor(), "trigger": _trigger(), "form": _form()},
    }


def schema_of(hint: Any) -> dict[str, Any]:
    """The schema of a field's type. Raises TypeError for a type that plan files cannot spell."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in NAMES:
        return {"$ref": f"#/$defs/{NAMES[hint]}"}
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [schema_of(argument) for argument in arguments]}
    if origin is tuple:
        items = schema_of(arguments[0])
        fixed = {} if arguments[-1] is Ellipsis else {"minItems": len(arguments), "maxItems": len(arguments)}
        return {"type": "array", "items": items, **fixed}
    if origin is dict:
        return {"type": "object"}
    plain = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
    if hint not in plain:
        raise TypeError(f"{hint!r} has no spelling in a plan file")
    return {"type": plain[hint]}


def _predictor() -> dict[str, Any]:
    def one(name: str) -> dict[str, Any]:
        low, high = orders_of(name)
        order = {"type": "integer", "minimum": low, "maximum": high}
        return {"properties": {"name": {"const": name}, "order": order}}

    return {
        "type": "object",
        "properties": {
            "name": {"enum": list(RULES)},
            "order": {"type": "integer"},
            "options": {"type": "object", "additionalProperties": {"type": "number"}},
        },
        "required": ["name", "order", "options"],
        "additionalProperties": False,
        "anyOf": [one(name) for name in RULES],
    }


def _trigger() -> dict[str, Any]:
    found = []
    for kind, cls in kinds_of(Trigger).items():
        hints = typing.get_type_hints(cls)
        found.append(
            {
                "type": "object",
                "properties": {"kind": {"const": kind}, **{f.name: schema_of(hints[f.name]) for f in fields(cls)}},
                "required": ["kind", *required(cls)],
                "additionalProperties": False,
            }
        )
    return {"anyOf": found}


def _form() -> dict[str, Any]:
    number = {"type": "number"}
    parts = {"type": "array", "items": {"$ref": "#/$defs/predictor"}}
    grid = {"anyOf": [{"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2}, {"type": "null"}]}
    path = {"anyOf": [{"type": "string"}, {"type": "null"}]}
    known = {
        "bands": [
            {
                "transform": {"enum": list(TRANSFORMS)},
                "cutoff": {"type": "number", "minimum": 0, "maximum": 1},
                "grid": grid,
                "predictors": {**parts, "minItems": 2, "maxItems": 2},
            }
        ],
        "clusters": [
            {
                "of_channel": {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
                "predictors": {**parts, "minItems": 1},
            }
        ],
        "tokens": [
            {"select": {"const": select}}
            | ({} if select in NO_RATIO else {"ratio": {"anyOf": [number, {"type": "array", "items": number}]}})
            | dict.fromkeys(options, number)
            for select, options in SELECTORS.items()
        ],
        "corrector": [
            {"kind": {"const": kind}}
            | {name: {"type": "integer", "minimum": 1} if name == "rank" else path for name in names[1:]}
            for kind, names in CORRECTORS.items()
        ],
    }
    if set(known) != set(kinds_of(Form)):
        raise TypeError(f"forms without a schema: {sorted(set(kinds_of(Form)) - set(known))}")
    return {
        "anyOf": [
            {
                "type": "object",
                "properties": {
                    kind: {
                        "type": "object",
                        "properties": properties,
                        "required": list(properties),
                        "additionalProperties": False,
                    }
                },
                "required": [kind],
                "additionalProperties": False,
            }
            for kind, several in known.items()
            for properties in several
        ]
    }


if __name__ == "__main__":
    print(json.dumps(plan_schema(), indent=1))
