"""Validation of `bundle.json` against its JSON Schema, with the path of each fault.

The schema (`schema/bundle.schema.json`, draft 2020-12) is also for editors, which show its descriptions and complete
names. It covers the form of each entry; conditions on the template or on several entries are checked by
`medseg.bundle.compose`.
"""

from __future__ import annotations

import json
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

from medseg.errors import BundleError
from medseg.files import load_json

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import jsonschema

__all__ = ["SCHEMA", "check_source", "nearest", "place"]

SCHEMA: Final = Path(__file__).parent / "schema" / "bundle.schema.json"
_TYPES: Final = {
    "array": "a list",
    "boolean": "true or false",
    "integer": "an integer",
    "null": "null",
    "number": "a number",
    "object": "an object",
    "string": "a text",
}
_SHOWN: Final = 80
_MAX_FAULTS: Final = 5


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint for a misspelled name: `; did you mean 'x'?`, or the list of known names."""
    known = sorted(known)
    close = get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else f"; known are: {', '.join(known)}"


def check_source(source: object) -> None:
    """Check the content of a `bundle.json` against its schema.

    Raises:
        BundleError: Invalid entries; each line has the path of one, the value found and the value expected.
    """
    faults = [_fault(error) for error in sorted(_validator().iter_errors(source), key=lambda error: str(error.path))]
    if faults:
        left = [f"... and {len(faults) - _MAX_FAULTS} more"] if len(faults) > _MAX_FAULTS else []
        raise BundleError("\n".join(faults[:_MAX_FAULTS] + left))


def place(path: Sequence[str | int]) -> str:
    """Return the location of an entry, such as `bundle.json: knobs.spacing[1]`."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return f"bundle.json: {text.lstrip('.')}" if path else "bundle.json"


@cache
def _validator() -> jsonschema.Draft202012Validator:
    import jsonschema

    return jsonschema.Draft202012Validator(load_json(SCHEMA))


def _fault(error: jsonschema.ValidationError) -> str:
    where, found = place(error.absolute_path), error.instance
    if error.validator == "required":
        return f"{where}: missing {', '.join(name for name in error.validator_value if name not in found)}"
    if error.validator == "additionalProperties":
        known = error.schema["properties"]
        return "\n".join(f"{where}: unknown key '{key}'{nearest(key, known)}" for key in found if key not in known)
    hint = nearest(str(found), map(str, error.validator_value)) if error.validator == "enum" else ""
    return f"{where}: found {_shown(found)}, expected {_expected(error)}{hint}"


def _expected(error: jsonschema.ValidationError) -> str:
    """Describe the expected value: its type or minimum, otherwise the description in the schema."""
    value = error.validator_value
    if error.validator == "type":
        return " or ".join(_TYPES[name] for name in ([value] if isinstance(value, str) else value))
    if error.validator == "enum":
        return f"one of {', '.join(map(str, value))}"
    if error.validator == "minimum":
        return f"{value} or more"
    if error.validator in ("minProperties", "minLength"):
        return f"at least {value} of its {'entries' if error.validator == 'minProperties' else 'characters'}"
    description: str = error.schema["description"]
    return description[0].lower() + description[1:].rstrip(".")


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} ..."
