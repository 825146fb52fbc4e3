"""Full checks of a bundle: train, evaluate, predict and export copies of it, with medseg and with MONAI.

Each check uses the files of earlier checks in the trial's folder.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from medseg.bundle.catalog import Bundle
from medseg.files import load_json, sha256_file
from medseg.jobs import api
from medseg.tools.export import export
from medseg.tools.export_formats import FORMATS, missing_packages
from medseg.tools.samples import write_samples

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from medseg.bundle.compose import Config

__all__ = ["FULL_CHECKS", "FaultError", "SkipError", "Trial", "raise_fault"]

# Candidate sides of crops and windows for the short training, smallest first.
_SIDES: Final = {2: (64, 96, 128, 192), 3: (16, 32, 48, 64)}
_TIMEOUT: Final = 900.0


class SkipError(Exception):
    """A check that does not apply, or whose inputs are missing after an earlier failure."""


class FaultError(Exception):
    """A fault that a check has found."""


def raise_fault(text: str) -> str:
    """Raise a fault unless the text is empty; return the empty text, which means "ok".

    Raises:
        FaultError: The text is not empty.
    """
    if text:
        raise FaultError(text)
    return ""


@dataclass
class Trial:
    """A bundle under test, with the folder of its copies.

    Attributes:
        bundle: Bundle under test, which is not changed.
        folder: Folder of all output.
        monai: Error of each job of MONAI's process, or an empty string, by job.
    """

    bundle: Bundle
    folder: Path
    monai: dict[str, str] = field(default_factory=dict)

    @property
    def ours(self) -> Bundle:
        """Copy that medseg trains."""
        return Bundle(self.folder / "ours" / self.bundle.name)

    @property
    def theirs(self) -> Bundle:
        """Copy that MONAI trains."""
        return Bundle(self.folder / "theirs" / self.bundle.name)

    @property
    def data(self) -> Path:
        """Folder of the generated data set."""
        return self.folder / "data"

    @property
    def image(self) -> Path:
        """Validation image of the generated data set."""
        (case,) = load_json(self.data / "dataset.json")["validation"]
        return self.data / str(case["image"])

    @property
    def trained(self) -> Bundle:
        """Bundle under test if it has weights, otherwise the trained copy."""
        if self.bundle.weights.is_file():
            return self.bundle
        self.needs(self.ours.weights)
        return self.ours

    def needs(self, path: Path) -> Path:
        """Return the path, or skip the check if an earlier check failed to write the file."""
        if not path.is_file():
            raise SkipError(f"no {path.name}, since an earlier check failed")
        return path

    def settings(self, *configs: str) -> dict[str, Any]:
        """Return values for a short job, for the settings that it has."""
        config: Config = {}
        for content in self.bundle.load_configs(*configs).values():
            config.update(content)
        return {name: value for name, value in self._short(config).items() if name in config}

    def _short(self, config: Mapping[str, Any]) -> dict[str, Any]:
        size = _small_size(config)
        return {
            "device_name": "cpu",
            "max_epochs": 1,
            "val_interval": 1,
            "warmup_epochs": 0,
            "steps_per_epoch": 2,
            "accumulate": 1,
            "num_workers": 0,
            "patience": 0,
            "pictures": 0,
            "patches_per_case": 1,
            "overlap": 0.0,
            "batch_size": min(2, config.get("batch_size", 2)),
            **({} if size is None else {"patch_size": size, "roi_size": size}),
        }


def _small_size(config: Mapping[str, Any]) -> list[int] | None:
    """Return the smallest valid size of crops and windows, or None to keep both."""
    import torch
    from monai.bundle import ConfigParser
    from torch._subclasses.fake_tensor import FakeTensorMode

    from medseg.errors import SizeError

    roi = config.get("roi_size")
    if not isinstance(roi, list):
        return None
    with FakeTensorMode(), torch.no_grad():
        network = ConfigParser(dict(config)).get_parsed_content("network_def").train()
        for side in _SIDES[3 if len(roi) == 3 else 2]:
            size = [min(side, n) for n in roi]
            try:
                logits = network(torch.empty(1, config["network_def"]["in_channels"], *size))
            except SizeError:
                continue
            # Networks without padding, whose crops and labels differ in size, keep their sizes.
            return size if list(logits.shape[2:]) == size else None
    return None


def _trains(trial: Trial) -> str:
    write_samples(trial.data, trial.bundle)
    for copy in (trial.ours, trial.theirs):
        _copy_untrained(trial.bundle, copy)
    settings = trial.settings("train")
    manifest = api.train(trial.ours.root, trial.data, settings=settings)
    if not trial.ours.weights.is_file():
        raise FaultError("training wrote no models/model.pt")
    return ", ".join(f"{name} {value:.3f}" for name, value in manifest.validations[-1].items() if name != "epoch")


def _copy_untrained(bundle: Bundle, target: Bundle) -> None:
    """Copy the configs of a bundle, without its weights and their metadata."""
    shutil.copytree(bundle.root / "configs", target.root / "configs")
    if (bundle.root / "bundle.json").is_file():
        shutil.copy(bundle.root / "bundle.json", target.root)
    metadata = target.metadata
    metadata.pop("weights", None)
    target.config_path("metadata").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")


def _evaluates(trial: Trial) -> str:
    trial.needs(trial.ours.weights)
    settings = trial.settings("train", "evaluate")
    manifest = api.evaluate(trial.ours.root, trial.data, output=trial.folder / "scores", settings=settings)
    failed = [str(record.error) for record in manifest.cases.values() if record.status == "failed"]
    return raise_fault("; ".join(failed))


def _predicts(trial: Trial) -> str:
    trial.needs(trial.ours.weights)
    settings = trial.settings("inference")
    manifest = api.predict(trial.ours.root, trial.image, trial.folder / "masks" / "ours", settings=settings)
    failed = [str(record.error) for record in manifest.cases.values() if record.status == "failed"]
    return raise_fault("; ".join(failed))


def _exports_as(file_format: str) -> Callable[[Trial], str]:
    def check(trial: Trial) -> str:
        if missing := missing_packages(file_format):
            raise SkipError(f"needs {', '.join(missing)}")
        done = export(trial.trained, file_format, trial.folder / f"model{FORMATS[file_format][0]}")
        worst = max(one.difference for one in done.differences)
        return f"{worst:.0e}, dynamic: {done.free or 'none'}"

    return check


# Runs jobs of MONAI one after the other and writes their errors, without importing medseg.
_MONAI = """
import json, sys
import monai.bundle
answers = {}
with open(sys.argv[1]) as file:
    jobs = json.load(file)
for name, function, arguments in jobs:
    try:
        getattr(monai.bundle, function)(**arguments)
        answers[name] = ""
    except BaseException as error:
        answers[name] = f"{type(error).__name__}: {error}"
    with open(sys.argv[2], "w") as file:
        json.dump(answers, file)
"""


def _monai_trains(trial: Trial) -> str:
    """MONAI's `run`, started in another folder, trains identical weights; its other jobs run in the same process."""
    trial.needs(trial.ours.weights)
    trial.monai = _run_monai(trial.folder, _monai_jobs(trial))
    raise_fault(trial.monai["train"])
    if sha256_file(trial.ours.weights) != sha256_file(trial.needs(trial.theirs.weights)):
        raise FaultError("weights trained by MONAI's run differ from those of medseg")
    return "identical"


def _monai_jobs(trial: Trial) -> list[tuple[str, str, dict[str, Any]]]:
    theirs, data = trial.theirs, str(trial.data)
    common = {"bundle_root": str(theirs.root), "meta_file": str(theirs.config_path("metadata"))}
    files = {name: str(theirs.config_path(name)) for name in ("train", "evaluate", "inference")}
    masks = {"dataset_dir": str(trial.image), "output_dir": str(trial.folder / "masks" / "theirs")}
    out = {"ckpt_file": str(theirs.weights), "net_id": "network_def", "config_file": files["inference"], **common}
    onnx = {"filepath": str(trial.folder / "monai.onnx")}
    return [
        ("train", "run", {"config_file": files["train"], "dataset_dir": data, **common, **trial.settings("train")}),
        (
            "evaluate",
            "run",
            {
                "config_file": [files["train"], files["evaluate"]],
                "dataset_dir": data,
                **common,
                **trial.settings("train", "evaluate"),
            },
        ),
        ("predict", "run", {"config_file": files["inference"], **masks, **common, **trial.settings("inference")}),
        ("ckpt_export", "ckpt_export", {"filepath": str(trial.folder / "monai.ts"), **out}),
        *([] if missing_packages("onnx") else [("onnx_export", "onnx_export", {**onnx, **out})]),
    ]


def _run_monai(folder: Path, jobs: list[tuple[str, str, dict[str, Any]]]) -> dict[str, str]:
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    requests, results = folder / "jobs.json", folder / "answers.json"
    requests.write_text(json.dumps(jobs), encoding="utf-8")
    command = [sys.executable, "-c", _MONAI, str(requests), str(results)]
    try:
        done = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True, timeout=_TIMEOUT, check=False)  # noqa: S603
    except subprocess.TimeoutExpired as error:
        raise FaultError(f"MONAI's process was stopped after {_TIMEOUT:.0f} s") from error
    answers: dict[str, str] = json.loads(results.read_text(encoding="utf-8")) if results.is_file() else {}
    ended = f"MONAI's process ended with code {done.returncode} before this job: {_last_error(done.stderr)}"
    found = {name: answers.get(name, ended) for name, _, _ in jobs}
    if left := sorted(path.name for path in elsewhere.iterdir()):
        found["train"] = found["train"] or f"MONAI wrote {', '.join(left)} to the folder where it was started"
    return found


def _last_error(said: str) -> str:
    """Return the last line with an error, or the last line if there is none."""
    lines = [line.strip() for line in said.splitlines() if line.strip()] or [""]
    errors = [line for line in lines if re.match(r"(?:\[rank\d\]: ?)?[\w.]*(?:Error|Exception)\b", line)]
    return (errors or lines)[-1][:500]


def _monai_evaluates(trial: Trial) -> str:
    return raise_fault(_of_monai(trial, "evaluate"))


def _monai_predicts(trial: Trial) -> str:
    """MONAI's `run` writes an identical mask."""
    raise_fault(_of_monai(trial, "predict"))
    ours, theirs = (
        {path.name: path.read_bytes() for path in (trial.folder / "masks" / whose).iterdir() if path.suffix != ".json"}
        for whose in ("ours", "theirs")
    )
    if not ours or ours != theirs:
        raise FaultError(f"masks of MONAI's run, {sorted(theirs)}, differ from those of medseg, {sorted(ours)}")
    return "identical"


def _monai_exports(trial: Trial) -> str:
    """MONAI's export commands accept the bundle."""
    raise_fault(_of_monai(trial, "ckpt_export"))
    if "onnx_export" not in trial.monai:
        return f"TorchScript; ONNX needs {', '.join(missing_packages('onnx'))}"
    return raise_fault(trial.monai["onnx_export"])


def _of_monai(trial: Trial, job: str) -> str:
    if job not in trial.monai:
        raise SkipError("MONAI's process was not started, since an earlier check failed")
    return trial.monai[job]


def _trains_in_two_processes(trial: Trial) -> str:
    """`torch.distributed.run` starts MONAI's `run` in two processes, in another folder."""
    name = "multi_gpu_train"
    if not trial.bundle.config_path(name).is_file():
        raise SkipError(f"the bundle has no configs/{name}.json")
    pair = Bundle(trial.folder / "pair" / trial.bundle.name)
    _copy_untrained(trial.bundle, pair)
    elsewhere = trial.folder / "pair" / "elsewhere"
    elsewhere.mkdir()
    options = {
        "config_file": str([str(pair.config_path(config)) for config in ("train", name)]),
        "meta_file": pair.config_path("metadata"),
        "bundle_root": pair.root,
        "dataset_dir": trial.data,
        **trial.settings("train", name),
        "batch_size": 2,
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [
        "-m",
        "monai.bundle",
        "run",
        *(part for key, value in options.items() for part in (f"--{key}", str(value))),
    ]
    try:
        done = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True, timeout=_TIMEOUT, check=False)  # noqa: S603
    except subprocess.TimeoutExpired as error:
        raise FaultError(f"the two processes were stopped after {_TIMEOUT:.0f} s") from error
    if done.returncode or not pair.weights.is_file():
        raise FaultError(f"the two processes ended with code {done.returncode}: {_last_error(done.stderr)}")
    return ""


FULL_CHECKS: dict[str, Callable[[Trial], str]] = {
    "train": _trains,
    "evaluate": _evaluates,
    "predict": _predicts,
    **{file_format: _exports_as(file_format) for file_format in FORMATS},
    "MONAI train": _monai_trains,
    "MONAI evaluate": _monai_evaluates,
    "MONAI predict": _monai_predicts,
    "MONAI export": _monai_exports,
    "two processes": _trains_in_two_processes,
}
