"""Checks of a bundle: built from its source, declarative, valid for MONAI, and able to run.

The fast checks read files and build components. The full checks (`medseg.tools.trials`) also train a copy of the bundle
for one epoch on generated data, evaluate, predict and export it, and repeat this with MONAI's runner in a separate
process and folder, whose output must be identical.
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from medseg.bundle.build import stale_files
from medseg.bundle.catalog import Bundle
from medseg.bundle.source_schema import SCHEMA
from medseg.bundle.trust import require_trust
from medseg.errors import MedsegError
from medseg.files import load_json
from medseg.tools.samples import write_samples
from medseg.tools.trials import FULL_CHECKS, FaultError, SkipError, Trial, raise_fault

if TYPE_CHECKING:
    from collections.abc import Callable

    from medseg.types import Progress

__all__ = ["CHECKS", "FULL_CHECKS", "Outcome", "check_bundle", "examine"]

_JOBS = (
    ("train", ("train",)),
    ("train", ("train", "multi_gpu_train")),
    ("train", ("train", "evaluate")),
    ("infer", ("inference",)),
)
_SCHEMA = SCHEMA.with_name("meta_schema_20240725.json")


class Outcome(NamedTuple):
    """Outcome of one check.

    Attributes:
        status: Status: "ok", "failed" or "skipped".
        text: Fault, reason for skipping, or measured values.
    """

    status: str
    text: str = ""


def check_bundle(bundle: Bundle) -> dict[str, str]:
    """Run the fast checks and return the fault of each by name, an empty string if there is none."""
    return {name: found.text if found.status == "failed" else "" for name, found in examine(bundle).items()}


def examine(bundle: Bundle, *, full: bool = False, report: Progress | None = None) -> dict[str, Outcome]:
    """Run the checks on a bundle, which is not changed.

    Args:
        bundle: Bundle with a `bundle.json`.
        full: Whether to also train, evaluate, predict and export on generated data, which takes minutes and the memory
            of a training.
        report: Callback for each check, with the number of finished checks, the total and the check's name.

    Returns:
        Outcome of each check, by the names in `CHECKS` and `FULL_CHECKS`.
    """
    total = len(CHECKS) + (len(FULL_CHECKS) if full else 0)
    found: dict[str, Outcome] = {}

    def note(name: str, action: Callable[[], str]) -> None:
        if report is not None:
            report(len(found), total, f"{bundle.name}: {name}")
        declarative = found.get("declarative", Outcome("ok")).status == "ok"
        found[name] = _outcome(action) if declarative else Outcome("skipped", "the bundle contains executable code")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, check in CHECKS.items():
            note(name, lambda check=check: raise_fault(check(bundle)))  # type: ignore[misc]
        if full:
            with tempfile.TemporaryDirectory(prefix="medseg-check-") as folder:
                trial = Trial(bundle, Path(folder).resolve())
                for name, run in FULL_CHECKS.items():
                    note(name, lambda run=run: run(trial))  # type: ignore[misc]
    return found


def _outcome(action: Callable[[], str]) -> Outcome:
    """Run a check; any exception is an outcome, so that the other checks still run."""
    try:
        return Outcome("ok", action())
    except SkipError as skipped:
        return Outcome("skipped", str(skipped))
    except (MedsegError, FaultError) as error:
        return Outcome("failed", str(error))
    except Exception as error:
        return Outcome("failed", f"{type(error).__name__}: {error}")


# Fast checks


def _is_built(bundle: Bundle) -> str:
    """Check that the configs are up to date with `bundle.json`, and that the folder has the bundle's name."""
    stale = stale_files(bundle)
    name = load_json(bundle.root / "bundle.json")["name"]
    if name != bundle.name:
        return f"name '{name}' in bundle.json differs from the folder name '{bundle.name}'; rename one of them"
    return f"{', '.join(stale)} differ from bundle.json; run `medseg bundle build {bundle.root}`" if stale else ""


def _is_declarative(bundle: Bundle) -> str:
    for _, names in _JOBS:
        require_trust(bundle.root, bundle.load_configs(*names))
    return ""


def _fits_schema(bundle: Bundle) -> str:
    import jsonschema

    metadata = bundle.metadata
    faults = [error.message for error in jsonschema.Draft201909Validator(load_json(_SCHEMA)).iter_errors(metadata)]
    if metadata.get("version") not in metadata.get("changelog", {}):
        faults.append(f"the changelog has no entry for version {metadata.get('version')}")
    return "; ".join(faults)


def _has_properties(bundle: Bundle) -> str:
    """Run MONAI's check of the required config properties on a small data set."""
    from monai.bundle import ConfigWorkflow

    faults = []
    with tempfile.TemporaryDirectory() as folder:
        data = write_samples(Path(folder), bundle)
        for kind, names in _JOBS:
            workflow = ConfigWorkflow(
                config_file=[str(path) for path in bundle.config_paths(*names)],
                workflow_type=kind,
                logging_file=False,
                bundle_root=str(bundle.root),
                dataset_dir=str(data),
                output_dir=str(data / "output"),
                initialize=[],
            )
            workflow.initialize()
            faults += [f"{'+'.join(names)}: {name}" for name in workflow.check_properties()]
    return ", ".join(faults)


def _net_in_out(bundle: Bundle) -> str:
    """Run MONAI's check of the network's inputs and outputs against the metadata."""
    from monai.bundle import verify_net_in_out

    try:
        verify_net_in_out(
            net_id="network_def",
            meta_file=str(bundle.config_path("metadata")),
            config_file=str(bundle.config_path("inference")),
            device="cpu",
        )
    except (RuntimeError, ValueError) as error:
        return str(error)
    return ""


CHECKS: dict[str, Callable[[Bundle], str]] = {
    "built": _is_built,
    "declarative": _is_declarative,
    "schema": _fits_schema,
    "properties": _has_properties,
    "net in/out": _net_in_out,
}
