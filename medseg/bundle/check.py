"""Is a bundle what its source says, what MONAI expects, and free of programs?"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from medseg.bundle.build import built_files
from medseg.bundle.samples import write_samples
from medseg.bundle.trust import load_json, require_trust
from medseg.errors import MedsegError

if TYPE_CHECKING:
    from collections.abc import Callable

    from medseg.bundle.catalog import Bundle

__all__ = ["CHECKS", "check_bundle"]

_JOBS = (("train", ("train",)), ("train", ("train", "evaluate")), ("infer", ("inference",)))
_SCHEMA = Path(__file__).parent / "schema" / "meta_schema_20240725.json"


def check_bundle(bundle: Bundle) -> dict[str, str]:
    """Run all checks; return what is wrong by the check's name, empty where all is well."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {name: _outcome(check, bundle) for name, check in CHECKS.items()}


def _outcome(check: Callable[[Bundle], str], bundle: Bundle) -> str:
    try:
        return check(bundle)
    except MedsegError as error:
        return str(error)


def _is_built(bundle: Bundle) -> str:
    """The configs are what `bundle.json` gives now, and the folder bears its name."""
    files = built_files(bundle)
    name = load_json(bundle.root / "bundle.json")["name"]
    if name != bundle.name:
        return f"bundle.json is named '{name}' but lies in folder '{bundle.name}'; make them agree"
    stale = [
        name
        for name, text in files.items()
        if not (bundle.root / name).is_file() or (bundle.root / name).read_text(encoding="utf-8") != text
    ]
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
    """MONAI's own check of the ids that other programs look for, on a tiny data set."""
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
    """MONAI's own check of the network against the metadata."""
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
