"""From the values in label files to the classes of a model."""

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
# Above this spread of values a table of all of them costs more than looking for the distinct ones.
_MAX_TABLE = 1 << 20
_MAX_CLASS = 2**31 - 2
_UNKNOWN = 2**31 - 1


class MapLabelsd(MapTransform):  # type: ignore[misc]  # MONAI publishes no types
    """Replace the values of a label by the class indices that a model is trained on.

    Label conventions differ: 0 and 255, one number per instance, inverted foreground. The mapping makes them explicit,
    and a value that it does not name stops the case.

    Args:
        keys: the labels, whole numbers of any shape and type.
        mapping: from the value in the file, as text or number, to the class index. The key "other" stands for every
            value that is not named: `{"0": 0, "other": 1}` makes one foreground of all instances.
        allow_missing_keys: pass over keys that a case lacks.

    Raises:
        RequestError: the mapping itself is wrong.
        CaseError: a label holds a value that the mapping does not name.
    """

    traits = Traits("kept", per_pixel=True)

    def __init__(
        self, keys: KeysCollection, mapping: Mapping[str, int] | Mapping[int, int], *, allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.mapping, self.other = _parse(mapping)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return `data` with mapped labels, int32, of unchanged shape and metadata."""
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
                f"{_origin(label, key)} holds the label {_shown(found)}, which the mapping does not name: it knows "
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
        raise RequestError('The label mapping is empty: expected for instance {"0": 0, "1": 1}.')
    for key, index in mapping.items():
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index <= _MAX_CLASS:
            raise RequestError(f"The label mapping gives {key!r} the class {index!r}: expected a number of 0 or more.")
        if key == _OTHER:
            other = index
            continue
        value = _value(key)
        if value in known:
            raise RequestError(f"The label mapping names the value {value} twice.")
        known[value] = index
    return known, other


def _value(key: Any) -> int:
    try:
        return int(str(key))
    except ValueError:
        raise RequestError(f"The label mapping has the key {key!r}: expected a whole number or 'other'.") from None


def _whole_numbers(label: Any, key: Hashable) -> torch.Tensor:
    values = plain_tensor(label)
    if not values.is_floating_point():
        return values if values.dtype == torch.int64 else values.to(torch.int32)
    wrong = (values != values.round()) | values.isinf()
    if wrong.any():
        raise CaseError(f"{_origin(label, key)} holds {values[wrong][0].item():g}: expected whole numbers.")
    return values.to(torch.int64)


def _spread(values: torch.Tensor) -> int:
    return int(values.max()) - int(values.min()) if values.numel() else 0


def _origin(label: Any, key: Hashable) -> str:
    name = label.meta.get("filename_or_obj") if isinstance(label, MetaTensor) else None
    return str(name or f"The label {key!r}")


def _shown(values: torch.Tensor) -> str:
    texts = [str(int(value)) for value in values[:5]]
    return ", ".join(texts) + (f" and {len(values) - 5} more" if len(values) > 5 else "")
