"""Masks that number objects, from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from medseg.bundle.catalog import Bundle, find_bundle
from medseg.networks import UNet


@pytest.fixture(scope="module")
def bundle(make_bundle: Any) -> Bundle:
    """A small bundle that numbers objects; its network calls what is bright a cell."""
    source = json.loads((find_bundle("cells_phase_unet").root / "bundle.json").read_text(encoding="utf-8"))
    source["network_def"]["features"] = [4, 8]
    source["knobs"] |= {"margin": 8, "patch_size": [60, 60], "roi_size": [60, 60], "min_object_size": 10}
    made: Bundle = make_bundle(source)
    made.weights.parent.mkdir()
    torch.save(_of_brightness().state_dict(), made.weights)
    return made


def _of_brightness() -> nn.Module:
    """Return a network that hands the image on through its skip and compares it with 0.5."""
    network = UNet(2, 1, 2, (4, 8), padding="valid")
    for weight in network.parameters():
        nn.init.zeros_(weight)
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    with torch.no_grad():
        for number, channel in ((0, 0), (1, 0), (4, 4), (5, 0)):
            convolutions[number].weight[0, channel, 1, 1] = 1
        convolutions[6].weight[1, 0] = 1
        convolutions[6].bias[1] = -0.5
    return network


@pytest.mark.parametrize(("setting", "values", "named"), [("true", [0, 1, 2, 3], None), ("false", [0, 1], {1: "cell"})])
def test_pictures_name_the_classes_where_the_values_are_classes(
    medseg: Any,
    bundle: Bundle,
    setting: str,
    values: list[int],
    named: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    picture = np.full((70, 90), 20, np.uint8)
    for row, column in ((5, 5), (30, 60), (50, 10)):
        picture[row : row + 12, column : column + 12] = 220
    Image.fromarray(picture).save(tmp_path / "cells.png")
    from medseg.reporting import overlay

    drawn, given = overlay.write_overlay, []
    monkeypatch.setattr(overlay, "write_overlay", lambda *a, **k: given.append(k["labels"]) or drawn(*a, **k))
    options = ("--overlay", "--set", f"number_objects={setting}")
    code, out, _ = medseg("predict", bundle.root, tmp_path / "cells.png", "-o", tmp_path / "out", *options)
    assert code == 0, out
    assert given == [named]
    with Image.open(tmp_path / "out" / "cells.png") as file:
        mask = np.asarray(file)
    assert np.unique(mask).tolist() == values
    assert np.array_equal(mask > 0, picture > 100)
    assert (tmp_path / "out" / "cells_overlay.png").is_file()
