"""Whether a bundle is plain data or contains executable code, decided before anything of it is imported or evaluated.

A MONAI config is a program: any dotted `_target_` is imported and called, any text that starts with `$` is evaluated,
`%` pulls in another file. A bundle is *declarative* when none of that can happen except for the parts listed in
`medseg.bundle.allowed`; any other bundle runs only if the user gives the `fingerprint` of exactly its content.

What is judged is one job: the files that MONAI merges for it, since a later file may replace a value that an earlier
one refers to. Hand MONAI the very content that was checked. This module loads nothing but the standard library.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from medseg.bundle.allowed import ALLOWED, ARGUMENTS, PLACES
from medseg.bundle.upgrade import current_target
from medseg.errors import BundleError, UntrustedBundleError
from medseg.files import load_json, sha256_file
from medseg.version import __version__

__all__ = [
    "SETTINGS",
    "Finding",
    "check",
    "find_files",
    "find_programs",
    "fingerprint",
    "leads_inside",
    "require_trust",
]

MAX_DEPTH: Final = 64
SETTINGS: Final = "--set"

_TARGETS: Final = frozenset(
    f"{module}.{name}" for modules in ALLOWED.values() for module, names in modules.items() for name in names.split()
)
_SPECIAL_KEYS: Final = {"_target_", "_desc_", "_disabled_", "_mode_", "_requires_"}
# MONAI puts the bundle folder before the installed packages on the import path, so these can stand in for any of them.
_IMPORTABLE: Final = (".py", ".pyc", ".pyo", ".pyw", ".pyd", ".so", ".dylib", ".dll")
_ESCAPES: Final = re.compile(r"^\s*(?:[/\\~]|[A-Za-z]:[/\\])|(?:^|[/\\])\s*\.\.\s*(?:[/\\]|$)|://|\x00")
_IMPORT: Final = re.compile(r"\$\s*(?:import|from)\b")
_INDEX: Final = re.compile(r"0|[1-9][0-9]{0,8}")
_METADATA: Final = "_meta_"
# MONAI renames the first to the second when it reads a config, over what stands there.
_OLD_NAME: Final = "optional_packages_version"
_NEW_NAME: Final = "required_packages_version"
_INSIDE: Final = "medseg.components.inside"
_MISSING: Final = object()


@dataclass(frozen=True)
class Finding:
    """One thing in a bundle that runs something, or tries to.

    Attributes:
        where: the MONAI id in the config, as in `train::handlers::3`, or the path of a file in the bundle.
        kind: callable, expression, import, macro, mode, argument, reference, key, path, value, depth or file.
        value: what stands there, unabridged and unescaped.
        allowed: whether a declarative bundle may hold it.
        reason: why not; empty when allowed.
    """

    where: str
    kind: str
    value: str
    allowed: bool
    reason: str

    def __str__(self) -> str:
        verdict = f" ({self.reason})" if self.reason else ""
        return f"{_shown(self.where)[1:-1]}: {self.kind} {_shown(self.value)}{verdict}"


def find_programs(
    config: Mapping[str, Any], within: Mapping[str, Any] | None = None, *, metadata: bool = False
) -> list[Finding]:
    """List every callable, expression, macro and import of a config, and all else that a declarative one may not hold.

    Args:
        config: plain JSON data. Nothing in it is imported or evaluated.
        within: where `@` references lead, if the config runs as a part of something larger.
        metadata: whether this is the content of `metadata.json`, which configs find under `_meta_`.

    Returns:
        Findings in the order of the config; empty for pure data.
    """
    walk = _Walk(config if within is None else within)
    if not metadata and _METADATA in config:
        # It would take the place of the metadata in the files, or not, by the way in which MONAI is called.
        walk.note((_METADATA,), "key", _METADATA, "only metadata.json holds metadata")
    if _OLD_NAME in config and not (metadata and _NEW_NAME not in config):
        walk.note((_OLD_NAME,), "key", _OLD_NAME, f"MONAI puts it in the place of {_NEW_NAME}")
    walk.visit(config, (_METADATA,) if metadata else ())
    return walk.findings


def leads_inside(value: object, config: Mapping[str, Any]) -> bool:
    """Tell whether a value of a config is a folder in its own bundle, and stays one."""
    return _Walk(config).is_inside(value)


def find_files(bundle_root: Path) -> list[Finding]:
    """List the files that a declarative bundle may not hold: importable ones, links to elsewhere, non-JSON configs."""
    problems = ((name, _file_problem(bundle_root, name, path)) for name, path in _files(bundle_root))
    return [Finding(name, "file", name, False, problem) for name, problem in problems if problem]


def check(configs: Mapping[str, Mapping[str, Any]], bundle: str) -> None:
    """Refuse a job that is not declarative.

    Args:
        configs: the files of one job under their names, in the order in which MONAI merges them: an entry of a later
            file replaces the same entry of an earlier one. `metadata.json` may be among them, and under the name
            `SETTINGS` what the user changes, who may name any path but may not run anything either.
        bundle: what the user called the bundle.

    Raises:
        UntrustedBundleError: names the first few entries that a declarative bundle may not hold.
    """
    _refuse(bundle, _forbidden(configs))


def fingerprint(bundle_root: Path) -> str:
    """Return the SHA-256, in hex, of everything in a bundle folder.

    All files count, with their paths: a trusted program may read any of them, so none is omitted, neither
    weights nor results. Running a bundle in a way that changes its folder therefore changes its fingerprint.

    Raises:
        BundleError: the bundle cannot be read, or holds a link that leads out of it or something that is not a file.
    """
    digest = hashlib.sha256()
    for name, path in _files(bundle_root):
        if problem := _outside(bundle_root, path):
            raise BundleError(
                f"{_shown(name)} in {bundle_root} cannot be part of a fingerprint: it is {problem}; remove it"
            )
        try:
            entry = ["link", name, str(path.readlink())] if path.is_symlink() else ["file", name, sha256_file(path)]
        except OSError as error:
            raise BundleError(f"cannot read the bundle file {path}: {error}") from error
        digest.update(json.dumps(entry).encode())
    return digest.hexdigest()


def require_trust(bundle_root: Path, configs: Mapping[str, Mapping[str, Any]], trust: str | None = None) -> None:
    """Accept a job if its bundle is declarative, or if the user trusts exactly the bundle's content.

    Args:
        bundle_root: folder of the bundle. Its `configs/metadata.json` is checked too, since MONAI always reads it;
            as it is among the configs, or else as it lies there.
        configs: what is about to run, as for `check`.
        trust: Fingerprint given by the user. It is compared even for a declarative bundle.

    Raises:
        BundleError: the bundle cannot be read.
        UntrustedBundleError: Neither holds. The message does not give the right fingerprint, which only
            `medseg bundle inspect` prints, beside what it stands for.
    """
    if trust is None:
        metadata = bundle_root / "configs" / "metadata.json"
        known = {metadata.name: load_json(metadata)} if metadata.is_file() and metadata.name not in configs else {}
        _refuse(bundle_root.name, [*find_files(bundle_root), *_forbidden({**configs, **known})])
    elif not re.fullmatch(r"[0-9a-fA-F]{64}", trust):
        raise UntrustedBundleError(
            f"--trust takes the SHA-256 of a bundle, 64 hexadecimal digits, not {_shown(trust)}; "
            f"{_inspect(bundle_root.name)} prints it"
        )
    elif trust.lower() != fingerprint(bundle_root):
        raise UntrustedBundleError(
            f"bundle {_shown(bundle_root.name)} does not match --trust {trust[:12]}...: files were added, "
            f"removed or changed. Inspect it again: {_inspect(bundle_root.name)} prints its present SHA-256"
        )


class _Walk:
    """Goes through a config and notes what it finds; `whole` is where its references lead."""

    def __init__(self, whole: Mapping[str, Any]) -> None:
        self.whole = whole
        self.findings: list[Finding] = []
        self.judged: dict[tuple[str, tuple[object, ...]], bool] = {}

    def visit(self, value: object, at: tuple[str, ...]) -> None:
        if len(at) > MAX_DEPTH:
            self.note(at, "depth", "...", f"nested more than {MAX_DEPTH} levels deep")
        elif isinstance(value, Mapping):
            if "_target_" in value:
                self.component(value, at)
            for key, item in value.items():
                self.key(key, at)
                self.visit(item, (*at, str(key)))
        elif isinstance(value, list | tuple):
            for index, item in enumerate(value):
                self.visit(item, (*at, str(index)))
        elif isinstance(value, str):
            self.text(value, at)
        elif not isinstance(value, bool | int | float | None):
            self.note(at, "value", value, "not plain JSON data")

    def note(self, at: tuple[str, ...], kind: str, value: object, reason: str = "") -> None:
        text = value if isinstance(value, str) else repr(value)
        self.findings.append(Finding("::".join(at), kind, text, not reason, reason))

    def key(self, key: object, at: tuple[str, ...]) -> None:
        if not isinstance(key, str) or not key:
            self.note(at, "key", key, "keys are non-empty text")
        elif "::" in key or "#" in key or key.lstrip()[:1] in ("$", "%", "@", "+"):
            self.note(at, "key", key, "holds a sign that MONAI reads as part of an id, a macro or an expression")
        elif at[:1] != (_METADATA,) and _ESCAPES.search(key):
            self.note(at, "path", key, "leads out of the bundle or names an address")

    def text(self, text: str, at: tuple[str, ...]) -> None:
        start = text.lstrip()[:1]
        if at[:1] == ("imports",) or _IMPORT.match(text):
            self.note(at, "import", text, "imports modules of its own choice")
        elif start == "$":
            self.note(at, "expression", text, "would be evaluated as Python")
        elif start == "%":
            self.note(at, "macro", text, "would be replaced by the content of another place or file")
        elif start == "@":
            self.reference(text, at)
        elif at[:1] != (_METADATA,) and _ESCAPES.search(text):
            self.note(at, "path", text, "leads out of the bundle or names an address")

    def reference(self, text: str, at: tuple[str, ...]) -> None:
        found = self.look_up(text)
        if found is _MISSING:
            self.note(at, "reference", text, "this program has no such id; relative ids are not allowed")
        elif text.startswith("@_meta_"):
            # Metadata is prose with addresses in it, so what is taken from it is looked at here.
            items = found if isinstance(found, list) else [found]
            if any(isinstance(i, Mapping | list) or (isinstance(i, str) and _ESCAPES.search(i)) for i in items):
                self.note(at, "reference", text, "only plain values may be taken from the metadata")

    def component(self, config: Mapping[str, Any], at: tuple[str, ...]) -> None:
        target = config["_target_"]
        in_metadata = at[:1] == (_METADATA,)
        self.note(at, "callable", target, "metadata runs nothing" if in_metadata else _target_problem(target))
        if config.get("_mode_", "default") != "default":
            self.note((*at, "_mode_"), "mode", config["_mode_"], 'only "default" is allowed')
        if not isinstance(config.get("_disabled_", False), bool):
            self.note((*at, "_disabled_"), "argument", config["_disabled_"], "only true or false is allowed")
        rules = {**ARGUMENTS["*"], **(ARGUMENTS.get(target, {}) if isinstance(target, str) else {})}
        for name, value in config.items():
            if str(name).startswith("_") and name not in _SPECIAL_KEYS:
                self.note((*at, str(name)), "argument", value, "no argument of an allowed part starts with _")
            elif name in rules and not self.is_one_of(value, rules[name]):
                self.note((*at, name), "argument", value, f"only {', '.join(map(repr, rules[name]))} allowed")
            elif name == "bundle_root" and value != "@bundle_root":
                self.note((*at, name), "argument", value, "only '@bundle_root' allowed")
        if isinstance(target, str) and target in PLACES:
            self.place(config, PLACES[target], at)

    def place(self, config: Mapping[str, Any], argument: str, at: tuple[str, ...]) -> None:
        # MONAI's own defaults are folders where the user happens to be; ours have none.
        value = config.get(argument, "" if config["_target_"].startswith("monai.") else "@output_dir")
        if value != "@output_dir" and not self.is_inside(value):
            reason = f"files go to @output_dir, or to a folder that {_INSIDE} gives for @bundle_root"
            self.note((*at, argument), "path", value, reason)

    def is_inside(self, value: object, hops: int = 0) -> bool:
        if isinstance(value, Mapping):
            fixed = value.get("_target_") == _INSIDE and value.get("root") == "@bundle_root"
            return fixed and not value.get("_disabled_", False)
        follow = isinstance(value, str) and value.startswith("@") and hops <= MAX_DEPTH
        return follow and self.is_inside(self.look_up(str(value)), hops + 1)

    def is_one_of(self, value: object, choices: tuple[object, ...], hops: int = 0) -> bool:
        if hops > MAX_DEPTH:
            return False
        if isinstance(value, str) and value.startswith("@"):
            # Each reference once: lists of references to lists of references would take forever.
            judged = (value, choices)
            if judged not in self.judged:
                self.judged[judged] = False
                self.judged[judged] = self.is_one_of(self.look_up(value), choices, hops + 1)
            return self.judged[judged]
        if isinstance(value, list | tuple):
            return all(self.is_one_of(item, choices, hops + 1) for item in value)
        if isinstance(value, Mapping):
            target = str(value.get("_target_"))
            return target in _TARGETS and target.rpartition(".")[2] in choices
        return any(type(value) is type(choice) and value == choice for choice in choices)

    def look_up(self, reference: str) -> object:
        found: object = self.whole
        for step in reference[1:].replace("#", "::").split("::"):
            if not re.fullmatch(r"\w+", step):
                return _MISSING
            if isinstance(found, Mapping):
                found = found.get(step, _MISSING)
            elif isinstance(found, list | tuple) and _INDEX.fullmatch(step) and int(step) < len(found):
                found = found[int(step)]
            else:
                return _MISSING
        return found


def _target_problem(target: object) -> str:
    if not isinstance(target, str) or "." not in target:
        return "must be the full dotted name of a part"
    if target in _TARGETS:
        return ""
    if (now := current_target(target)) is not None:
        return f"its name before medseg {__version__}; `medseg bundle build` on the bundle's folder renames it to {now}"
    return "not on the list of allowed parts"


def _forbidden(configs: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    parts = {name: {_METADATA: config} if _is_metadata(name) else config for name, config in configs.items()}
    # MONAI sets the metadata after the configs, whatever they say of it.
    whole = {key: parts[name][key] for name in sorted(parts, key=_is_metadata) for key in parts[name]}
    return [
        replace(found, where=f"{name}: {found.where}")
        for name, config in configs.items()
        for found in find_programs(config, whole, metadata=_is_metadata(name))
        if not (found.allowed or (name == SETTINGS and found.kind == "path"))
    ]


def _is_metadata(name: str) -> bool:
    return Path(name).stem == "metadata"


def _refuse(bundle: str, forbidden: Sequence[Finding], shown: int = 5) -> None:
    if not forbidden:
        return
    lines = [f"  {found}" for found in forbidden[:shown]]
    if len(forbidden) > shown:
        lines.append(f"  ... and {len(forbidden) - shown} more")
    raise UntrustedBundleError(
        "\n".join([f"bundle {_shown(bundle)} was not started: it contains executable code and is not trusted", *lines])
        + f"\n{_inspect(bundle)} lists everything it would execute, without executing it, and its SHA-256. "
        "If you trust all of it, repeat the command with --trust SHA256"
    )


def _inspect(bundle: str) -> str:
    return f"`medseg bundle inspect {_shown(bundle)[1:-1]}`"


def _shown(text: str, limit: int = 100) -> str:
    """Quote text so that control characters and look-alike letters show, cut to `limit` characters."""
    quoted = ascii(text if len(text) <= limit else text[:limit])
    return quoted if len(text) <= limit else f"{quoted[:-1]}...{quoted[-1]}"


def _files(root: Path) -> Iterator[tuple[str, Path]]:
    """Yield every file and link below `root` with its path inside, in a fixed order."""

    def fail(error: OSError) -> None:
        raise BundleError(f"cannot read the bundle {root}: {error}") from error

    paths = []
    for folder, folders, files in os.walk(root, onerror=fail):
        links = [name for name in folders if Path(folder, name).is_symlink()]
        paths += [Path(folder, name) for name in (*files, *links)]
    return iter(sorted((path.relative_to(root).as_posix(), path) for path in paths))


def _file_problem(root: Path, name: str, path: Path) -> str:
    if problem := _outside(root, path):
        return problem
    if path.is_symlink() and path.is_dir():
        return "a link to a folder, and copying might never end"
    if name.lower().endswith(_IMPORTABLE):
        return "Python could import it"
    if name.lower().split("/")[0] == "configs" and not name.lower().endswith(".json"):
        return "only JSON files may stand in configs"
    return ""


def _outside(root: Path, path: Path) -> str:
    try:
        if not path.resolve(strict=True).is_relative_to(root.resolve()):
            return "a link that leads out of the bundle"
        mode = path.stat().st_mode
    except (OSError, RuntimeError):  # older Pythons raise RuntimeError for a link that leads to itself
        return "a link that leads nowhere"
    return "" if stat.S_ISREG(mode) or stat.S_ISDIR(mode) else "not an ordinary file"
