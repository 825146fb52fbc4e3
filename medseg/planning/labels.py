"""The classes of a model, from the values in label files.

Label files are stored in several ways: one value per class, one value per object, or 0 and 255. Class names in
`dataset.json` settle which one it is; without them it is inferred from all training cases together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from medseg.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from medseg.planning.case_stats import CaseStats, Fingerprint

__all__ = ["Classes", "classes_of", "names_of_labels"]

# An instance map has the values 1..n in nearly every case, most of them a single component, and n varies between cases;
# class maps have a fixed set of values.
_NUMBERED = 0.9
_ONE_PIECE = 0.7
_MANY = 8
_SHOWN = 4


@dataclass(frozen=True)
class Classes:
    """The classes of a model.

    Attributes:
        labels: Class names by index; "0" is the background.
        mapping: Class index of each label value, for `MapLabelsd`.
        kind: Kind of label: "classes", "objects" or "two values".
        reason: Reason of that choice.
    """

    labels: dict[str, str]
    mapping: dict[str, int]
    kind: str
    reason: str

    @property
    def is_plain(self) -> bool:
        """Whether the label values are the class indices."""
        return self.mapping == {key: int(key) for key in self.labels}


def names_of_labels(content: Mapping[str, Any]) -> dict[int, str]:
    """Return the class name of each label value, from a `dataset.json` of the Decathlon or of nnU-Net.

    The Decathlon maps values to names, nnU-Net maps names to values.

    Raises:
        RequestError: Region-based labels or the "ignore" label of nnU-Net, which are not supported.
    """
    names: dict[int, str] = {}
    labels = content.get("labels")
    for key, value in labels.items() if isinstance(labels, dict) else ():
        if str(key).lstrip("-").isdigit():
            names[int(key)] = str(value[0] if isinstance(value, list) and value else value)
            continue
        if isinstance(value, list) or str(key).lower() == "ignore":
            what = "a region of several values" if isinstance(value, list) else "an 'ignore' label"
            raise RequestError(
                f"dataset.json defines {what}, which is not supported: '{key}': {value}. medseg trains mutually "
                "exclusive classes: name each value as a separate class."
            )
        if isinstance(value, int) and not isinstance(value, bool):
            names[value] = str(key)
    return names


def classes_of(fingerprint: Fingerprint) -> Classes:
    """Return the classes that the label values stand for.

    Raises:
        RequestError: Values missing in `dataset.json`, negative values, or labels without foreground.
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
        text = f"no label file contains 0; of the values {_listed(values)}, the lowest is taken as background"
    elif len(values) == 2:
        text = f"the label files contain two values, 0 and {values[1]}"
    else:
        text = f"the label files contain the class values {_listed(values)}"
    mapping = {str(value): index for index, value in enumerate(values)}
    names = ["foreground"] if len(values) == 2 else [f"label {value}" for value in values[1:]]
    labels = {str(index): name for index, name in enumerate(["background", *names])}
    return Classes(labels, mapping, "two values" if len(values) == 2 else "classes", f"{text}{_shares(fingerprint)}")


def _refuse_values(cases: Sequence[CaseStats], values: Sequence[int], names: Mapping[int, str]) -> None:
    if len(values) < 2:
        raise RequestError(
            f"No foreground: all {len(cases)} training labels contain only the value {_listed(values)}, so there is "
            "nothing to learn."
        )
    if values[0] < 0:
        name = next(case.name for case in cases if min(case.values) < 0)
        raise RequestError(f"Negative label value: {values[0]} in the label of {name}. Expected integers from 0 up.")
    unknown = [value for value in values if names and value not in names and value != 0]
    if unknown:
        name = next(case.name for case in cases if set(case.values) & set(unknown))
        known = ", ".join(f"{value} ({label})" for value, label in sorted(names.items()))
        raise RequestError(
            f"Unknown label value: {_listed(unknown)} in the label of {name}, while dataset.json names only {known}. "
            "Add the value to 'labels', or remove 'labels' if the values number objects."
        )


def _named(values: Sequence[int], names: Mapping[int, str]) -> Classes:
    known = {0: "background", **names}
    order = sorted(known)
    mapping = {str(value): index for index, value in enumerate(order)}
    labels = {str(index): known[value] for index, value in enumerate(order)}
    unused = [f"{value} ({known[value]})" for value in order if value not in values]
    text = f"dataset.json names the values {', '.join(f'{value} ({known[value]})' for value in order)}"
    if unused:
        text += f"; no training case contains {', '.join(unused)}"
    return Classes(labels, mapping, "classes", text)


def _objects_reason(cases: Sequence[CaseStats]) -> str:
    """Return the reason why the values number objects; empty if they do not."""
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
        f"the label values number objects: {numbered:.0%} of the label files contain exactly the values 1..n, n ranges "
        f"from {min(counts)} to {max(counts)}, and {pieces:.0%} of the values are a single connected component; all "
        "objects become class 1. If the values are classes, name them in dataset.json"
    )


def _shares(fingerprint: Fingerprint) -> str:
    shares = [share for value, share in fingerprint.shares().items() if value != 0]
    largest = max(shares, default=0.0)
    note = f"; foreground covers {100 * sum(shares):.3g}% of all voxels" if shares else ""
    if largest > 0.5:
        note += ", more than half: check which value is the background"
    return note


def _listed(values: Sequence[int]) -> str:
    more = f" and {len(values) - _SHOWN} more" if len(values) > _SHOWN else ""
    return ", ".join(map(str, values[:_SHOWN])) + more
