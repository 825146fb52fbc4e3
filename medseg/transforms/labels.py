"""Mapping of label values to the class indices of a model."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform

from medseg.errors import CaseError, RequestError
from medseg.transforms.tensors import plain_tensor, with_metadata
from medseg.transforms.traits import Traits

__all__ = ["MapLabelsd"]

_OTHER = "other"
# Above this range of values a lookup table is slower than comparing each value.
_MAX_TABLE = 1 << 20
_MAX_CLASS = 2**31 - 2
_UNKNOWN = 2**31 - 1


class MapLabelsd(MapTransform):  # type: ignore[misc]  # MONAI publishes no types
    """Map the values of a label to the class indices of a model.

    Label conventions differ: 0 and 255, one value per instance, inverted foreground. The mapping makes them explicit;
    a value without an entry is an error.

    Args:
        keys: Keys of the labels, integers of any shape and type.
        mapping: Class index of each label value; values may be strings. The key "other" applies to all other values:
            `{"0": 0, "other": 1}` merges all instances into one foreground class.
        allow_missing_keys: Whether to skip keys missing in a case.

    Raises:
        RequestError: Invalid mapping.
        CaseError: Label value without an entry in the mapping.
    """

    traits = Traits("kept", per_pixel=True)

    def __init__(
        self, keys: KeysCollection, mapping: Mapping[str, int] | Mapping[int, int], *, allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.mapping, self.other = _parse(mapping)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return `data` with mapped labels (int32), with unchanged shape and metadata."""
        case = dict(data)
        for key in self.key_iterator(case):
            case[key] = self._map(case[key], key)
        return case

    def _map(self, label: Any, key: Hashable) -> torch.Tensor:
        values = _whole_numbers(label, key)
        mapped = self._by_table(values) if _spread(values) <= _MAX_TABLE else self._by_value(values)
        unknown = mapped == _UNKNOWN
        if unknown.any():
            found = torch.unique(values[unknown])
            raise CaseError(
                f"{_origin(label, key)} contains the unmapped label {_shown(found)}: the mapping has "
                f"{', '.join(map(str, sorted(self.mapping)))}. Add the value or 'other' to the mapping."
            )
        return with_metadata(mapped, label)

    def _by_table(self, values: torch.Tensor) -> torch.Tensor:
        if not values.numel():
            return values.to(torch.int32)
        low = int(values.min())
        table = torch.full((int(values.max()) - low + 1,), self._default, dtype=torch.int32)
        for value, index in self.mapping.items():
            if 0 <= value - low < len(table):
                table[value - low] = index
        return table.to(values.device).index_select(0, (values - low).flatten()).reshape(values.shape)

    def _by_value(self, values: torch.Tensor) -> torch.Tensor:
        mapped = torch.full_like(values, self._default, dtype=torch.int32)
        for value, index in self.mapping.items():
            mapped[values == value] = index
        return mapped

    @property
    def _default(self) -> int:
        return _UNKNOWN if self.other is None else self.other


def _parse(mapping: Mapping[Any, Any]) -> tuple[dict[int, int], int | None]:
    known: dict[int, int] = {}
    other: int | None = None
    if not mapping:
        raise RequestError('Empty label mapping: expected for example {"0": 0, "1": 1}.')
    for key, index in mapping.items():
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index <= _MAX_CLASS:
            raise RequestError(
                f"Invalid class {index!r} for {key!r} in the label mapping: expected an integer of at least 0."
            )
        if key == _OTHER:
            other = index
            continue
        value = _value(key)
        if value in known:
            raise RequestError(f"Duplicate value {value} in the label mapping.")
        known[value] = index
    return known, other


def _value(key: Any) -> int:
    try:
        return int(str(key))
    except ValueError:
        raise RequestError(f"Invalid key {key!r} in the label mapping: expected an integer or 'other'.") from None


def _whole_numbers(label: Any, key: Hashable) -> torch.Tensor:
    values = plain_tensor(label)
    if not values.is_floating_point():
        return values if values.dtype == torch.int64 else values.to(torch.int32)
    wrong = (values != values.round()) | values.isinf()
    if wrong.any():
        raise CaseError(f"{_origin(label, key)} contains the value {values[wrong][0].item():g}: expected integers.")
    return values.to(torch.int64)


def _spread(values: torch.Tensor) -> int:
    return int(values.max()) - int(values.min()) if values.numel() else 0


def _origin(label: Any, key: Hashable) -> str:
    name = label.meta.get("filename_or_obj") if isinstance(label, MetaTensor) else None
    return str(name or f"The label {key!r}")


def _shown(values: torch.Tensor) -> str:
    texts = [str(int(value)) for value in values[:5]]
    return ", ".join(texts) + (f" and {len(values) - 5} more" if len(values) > 5 else "")
