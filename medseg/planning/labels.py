"""From the values found in label files to the classes of a model.

Label files say the same thing in several ways: one number per class, one number per object, 0 and 255. Which of them it
is follows from all training cases together; names in `dataset.json` settle it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from medseg.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from medseg.planning.case_stats import CaseStats, Fingerprint

__all__ = ["Classes", "classes_of", "names_of_labels"]

# An object map numbers 1..n in nearly every case, most numbers are one piece, and n differs; organs come in fixed sets.
_NUMBERED = 0.9
_ONE_PIECE = 0.7
_MANY = 8
_SHOWN = 4


@dataclass(frozen=True)
class Classes:
    """The classes of a model.

    Attributes:
        labels: class index -> name, from "0".
        mapping: value in the files -> class index, as `MapLabelsd` takes it.
        kind: "classes", "objects" or "two values".
        reason: why.
    """

    labels: dict[str, str]
    mapping: dict[str, int]
    kind: str
    reason: str

    @property
    def is_plain(self) -> bool:
        """Whether files hold class indices already."""
        return self.mapping == {key: int(key) for key in self.labels}


def names_of_labels(content: Mapping[str, Any]) -> dict[int, str]:
    """Return value -> name from a `dataset.json`: value to name as in the Decathlon, or name to value as in nnU-Net.

    Raises:
        RequestError: nnU-Net's regions or its "ignore" label, which need a loss of their own.
    """
    names: dict[int, str] = {}
    labels = content.get("labels")
    for key, value in labels.items() if isinstance(labels, dict) else ():
        if str(key).lstrip("-").isdigit():
            names[int(key)] = str(value[0] if isinstance(value, list) and value else value)
            continue
        if isinstance(value, list) or str(key).lower() == "ignore":
            what = "a region of several labels" if isinstance(value, list) else "an ignored label"
            raise RequestError(
                f"dataset.json has {what}, '{key}': {value}. medseg trains exclusive classes: write each value as a "
                "class of its own."
            )
        if isinstance(value, int) and not isinstance(value, bool):
            names[value] = str(key)
    return names


def classes_of(fingerprint: Fingerprint) -> Classes:
    """Decide what the label values mean.

    Raises:
        RequestError: values that `dataset.json` does not name, negative ones, or no foreground at all.
    """
    cases = fingerprint.cases
    values = sorted({value for case in cases for value in case.values})
    _refuse_values(cases, values, fingerprint.label_names)
    if fingerprint.label_names:
        return _named(values, fingerprint.label_names)
    reason = _objects_reason(cases)
    if reason:
        return Classes({"0": "background", "1": "object"}, {"0": 0, "other": 1}, "objects", reason)
    if values[0] != 0:
        text = f"no label file holds 0; the lowest of the values {_listed(values)} is taken as background"
    elif len(values) == 2:
        text = f"the label files hold two values, 0 and {values[1]}"
    else:
        text = f"the label files hold the classes {_listed(values)}"
    mapping = {str(value): index for index, value in enumerate(values)}
    names = ["foreground"] if len(values) == 2 else [f"label {value}" for value in values[1:]]
    labels = {str(index): name for index, name in enumerate(["background", *names])}
    return Classes(labels, mapping, "two values" if len(values) == 2 else "classes", f"{text}{_shares(fingerprint)}")


def _refuse_values(cases: Sequence[CaseStats], values: Sequence[int], names: Mapping[int, str]) -> None:
    if len(values) < 2:
        raise RequestError(
            f"All {len(cases)} training labels hold only the value {_listed(values)}: there is nothing to learn."
        )
    if values[0] < 0:
        name = next(case.name for case in cases if min(case.values) < 0)
        raise RequestError(f"The label of {name} holds the value {values[0]}: expected whole numbers from 0 up.")
    unknown = [value for value in values if names and value not in names and value != 0]
    if unknown:
        name = next(case.name for case in cases if set(case.values) & set(unknown))
        known = ", ".join(f"{value} ({label})" for value, label in sorted(names.items()))
        raise RequestError(
            f"The label of {name} holds {_listed(unknown)}, which dataset.json does not name: it knows {known}. Add "
            "the value to its 'labels', or leave 'labels' out if the numbers count objects."
        )


def _named(values: Sequence[int], names: Mapping[int, str]) -> Classes:
    known = {0: "background", **names}
    order = sorted(known)
    mapping = {str(value): index for index, value in enumerate(order)}
    labels = {str(index): known[value] for index, value in enumerate(order)}
    unused = [f"{value} ({known[value]})" for value in order if value not in values]
    text = f"dataset.json names the values {', '.join(f'{value} ({known[value]})' for value in order)}"
    if unused:
        text += f"; no training case holds {', '.join(unused)}"
    return Classes(labels, mapping, "classes", text)


def _objects_reason(cases: Sequence[CaseStats]) -> str:
    """Return why the numbers count objects; empty if they do not."""
    filled = [case for case in cases if case.distinct]
    counts = [case.distinct for case in filled]
    if not counts or max(counts) < 3:
        return ""
    numbered = sum(case.contiguous for case in filled) / len(filled)
    pieces = sum(case.single for case in filled) / sum(counts)
    varied = len(set(counts)) > 2 or max(counts) >= 2 * min(counts)
    if numbered < _NUMBERED or pieces < _ONE_PIECE or not (varied or max(counts) >= 4 * _MANY):
        return ""
    if max(counts) < _MANY and len(filled) < _MANY:
        return ""
    return (
        f"the label values count objects: {numbered:.0%} of the label files hold exactly 1..n, n runs from "
        f"{min(counts)} to {max(counts)}, and {pieces:.0%} of the numbers are one connected piece; all become class 1. "
        "To keep them apart as classes, name them in dataset.json"
    )


def _shares(fingerprint: Fingerprint) -> str:
    shares = [share for value, share in fingerprint.shares().items() if value != 0]
    largest = max(shares, default=0.0)
    note = f"; foreground is {sum(shares):.3g} of all voxels" if shares else ""
    if largest > 0.5:
        note += ", more than half: it is segmented as it is, and what lies between it is the background class"
    return note


def _listed(values: Sequence[int]) -> str:
    more = f" and {len(values) - _SHOWN} more" if len(values) > _SHOWN else ""
    return ", ".join(map(str, values[:_SHOWN])) + more
