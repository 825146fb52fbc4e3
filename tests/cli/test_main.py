"""How the command line ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from medseg.jobs import api


def test_ctrl_c_says_that_what_was_finished_is_kept(
    medseg: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "train", interrupted)
    code, _, err = medseg("train", "hippocampus_mri_unet", "--data", tmp_path)
    assert code == 130
    assert "Stopped. What was finished is kept" in err
