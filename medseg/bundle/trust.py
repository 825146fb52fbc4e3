"""Whether a bundle is plain data or contains executable code, decided before anything of it is imported or evaluated.

A MONAI config can execute code: any dotted `_target_` is imported and called, any text that starts with `$` is
evaluated, and `%` includes another file. A bundle is *declarative* if it uses none of these but the components in the
list of `medseg.bundle.allowed`; any other bundle runs only if the user passes the `fingerprint` of exactly its content.

The unit of checking is one job with all the files that MONAI merges for it, because a later file may replace a value
that an earlier one refers to. MONAI must get the content that was checked. Only the standard library is imported.
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
# MONAI puts the bundle folder first on the import path, so these files could replace any installed package.
_IMPORTABLE: Final = (".py", ".pyc", ".pyo", ".pyw", ".pyd", ".so", ".dylib", ".dll")
_ESCAPES: Final = re.compile(r"^\s*(?:[/\\~]|[A-Za-z]:[/\\])|(?:^|[/\\])\s*\.\.\s*(?:[/\\]|$)|://|\x00")
_IMPORT: Final = re.compile(r"\$\s*(?:import|from)\b")
_INDEX: Final = re.compile(r"0|[1-9][0-9]{0,8}")
_METADATA: Final = "_meta_"
# MONAI renames the first key to the second when it reads a config, and overwrites an existing value.
_OLD_NAME: Final = "optional_packages_version"
_NEW_NAME: Final = "required_packages_version"
_INSIDE: Final = "medseg.components.inside"
_MISSING: Final = object()


@dataclass(frozen=True)
class Finding:
    """An entry or file of a bundle that executes code or is not allowed in a declarative bundle.

    Attributes:
        where: MONAI id of the entry, such as `train::handlers::3`, or path of the file in the bundle.
        kind: "callable", "expression", "import", "macro", "mode", "argument", "reference", "key", "path", "value",
            "depth", "file" or "weights".
        value: Value of the entry, neither shortened nor escaped.
        allowed: Whether it is allowed in a declarative bundle.
        reason: Reason why it is not; empty if it is.
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
    """List every callable, expression, macro and import of a config, and all else not allowed in a declarative one.

    Args:
        config: Config as JSON values. Nothing in it is imported or evaluated.
        within: Merged config in which `@` references are looked up; by default `config` itself.
        metadata: Whether `config` is the content of `metadata.json`, to which other configs refer as `_meta_`.

    Returns:
        Findings in the order of the config; empty for plain data.
    """
    walk = _Walk(config if within is None else within)
    if not metadata and _METADATA in config:
        # Whether it would replace the metadata in the files depends on how MONAI is called.
        walk.note((_METADATA,), "key", _METADATA, "metadata belongs in metadata.json")
    if _OLD_NAME in config and not (metadata and _NEW_NAME not in config):
        walk.note((_OLD_NAME,), "key", _OLD_NAME, f"MONAI renames it to {_NEW_NAME} and overwrites that entry")
    walk.visit(config, (_METADATA,) if metadata else ())
    return walk.findings


def leads_inside(value: object, config: Mapping[str, Any]) -> bool:
    """Return whether a value of a config is certainly a folder inside its bundle."""
    return _Walk(config).is_inside(value)


def find_files(bundle_root: Path) -> list[Finding]:
    """List the files not allowed in a declarative bundle: importable files, links outside, non-JSON configs."""
    problems = ((name, _file_problem(bundle_root, name, path)) for name, path in _files(bundle_root))
    return [Finding(name, "file", name, False, problem) for name, problem in problems if problem]


def check(configs: Mapping[str, Mapping[str, Any]], bundle: str) -> None:
    """Refuse a job that is not declarative.

    Args:
        configs: Contents of the job's files by name, in the order in which MONAI merges them: an entry of a later file
            replaces that of an earlier one. They may include `metadata.json`, and under the name `SETTINGS` the user's
            settings, which may name any path but may not execute anything either.
        bundle: Name of the bundle for the message.

    Raises:
        UntrustedBundleError: Entries not allowed in a declarative bundle; the message lists the first of them.
    """
    _refuse(bundle, _forbidden(configs))


def fingerprint(bundle_root: Path) -> str:
    """Return the SHA-256, in hex, of everything in a bundle folder.

    All files count, with their paths, including weights and results, because trusted code may read any of them. A job
    that writes into the bundle's folder therefore changes the fingerprint.

    Raises:
        BundleError: An unreadable bundle, or one with a link outside it or with something that is not a regular file.
    """
    digest = hashlib.sha256()
    for name, path in _files(bundle_root):
        if problem := _outside(bundle_root, path):
            raise BundleError(
                f"Cannot compute the SHA-256 of bundle {bundle_root}: {_shown(name)} is {problem}. Remove it."
            )
        try:
            entry = ["link", name, str(path.readlink())] if path.is_symlink() else ["file", name, sha256_file(path)]
        except OSError as error:
            raise BundleError(f"Cannot read the bundle file {path}: {error}.") from error
        digest.update(json.dumps(entry).encode())
    return digest.hexdigest()


def require_trust(bundle_root: Path, configs: Mapping[str, Mapping[str, Any]], trust: str | None = None) -> None:
    """Accept a job if its bundle is declarative, or if the user trusts exactly the bundle's content.

    Args:
        bundle_root: Folder of the bundle. Its `configs/metadata.json`, which MONAI always reads, is checked even if
            `configs` does not include it.
        configs: Configs of the job, as for `check`.
        trust: Fingerprint given by the user, which must match even for a declarative bundle.

    Raises:
        BundleError: An unreadable bundle.
        UntrustedBundleError: Neither is the case. The message does not contain the right fingerprint, which only
            `medseg bundle inspect` prints, together with what the bundle would execute.
    """
    if trust is None:
        metadata = bundle_root / "configs" / "metadata.json"
        known = {metadata.name: load_json(metadata)} if metadata.is_file() and metadata.name not in configs else {}
        _refuse(bundle_root.name, [*find_files(bundle_root), *_forbidden({**configs, **known})])
    elif not re.fullmatch(r"[0-9a-fA-F]{64}", trust):
        raise UntrustedBundleError(
            f"Invalid --trust {_shown(trust)}: expected the SHA-256 of the bundle, 64 hexadecimal digits, which "
            f"{_inspect(bundle_root.name)} prints."
        )
    elif trust.lower() != fingerprint(bundle_root):
        raise UntrustedBundleError(
            f"Bundle {_shown(bundle_root.name)} does not match --trust {trust[:12]}...: files were added, removed or "
            f"changed. Check it again with {_inspect(bundle_root.name)}, which prints its present SHA-256."
        )


class _Walk:
    """Traversal of a config that collects findings; references are looked up in `whole`."""

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
            self.note(at, "value", value, "not a JSON value")

    def note(self, at: tuple[str, ...], kind: str, value: object, reason: str = "") -> None:
        text = value if isinstance(value, str) else repr(value)
        self.findings.append(Finding("::".join(at), kind, text, not reason, reason))

    def key(self, key: object, at: tuple[str, ...]) -> None:
        if not isinstance(key, str) or not key:
            self.note(at, "key", key, "keys must be non-empty strings")
        elif "::" in key or "#" in key or key.lstrip()[:1] in ("$", "%", "@", "+"):
            self.note(
                at, "key", key, "contains a character that MONAI interprets as part of an id, a macro or an expression"
            )
        elif at[:1] != (_METADATA,) and _ESCAPES.search(key):
            self.note(at, "path", key, "leads outside the bundle or is a URL")

    def text(self, text: str, at: tuple[str, ...]) -> None:
        start = text.lstrip()[:1]
        if at[:1] == ("imports",) or _IMPORT.match(text):
            self.note(at, "import", text, "imports arbitrary modules")
        elif start == "$":
            self.note(at, "expression", text, "would be evaluated as Python")
        elif start == "%":
            self.note(at, "macro", text, "would be replaced by another entry or file")
        elif start == "@":
            self.reference(text, at)
        elif at[:1] != (_METADATA,) and _ESCAPES.search(text):
            self.note(at, "path", text, "leads outside the bundle or is a URL")

    def reference(self, text: str, at: tuple[str, ...]) -> None:
        found = self.look_up(text)
        if found is _MISSING:
            self.note(at, "reference", text, "no such id in the configs of this job; relative ids are not allowed")
        elif text.startswith("@_meta_"):
            # Metadata may contain URLs, so values taken from it are checked here.
            items = found if isinstance(found, list) else [found]
            if any(isinstance(i, Mapping | list) or (isinstance(i, str) and _ESCAPES.search(i)) for i in items):
                self.note(at, "reference", text, "only plain values may be taken from the metadata")

    def component(self, config: Mapping[str, Any], at: tuple[str, ...]) -> None:
        target = config["_target_"]
        in_metadata = at[:1] == (_METADATA,)
        self.note(at, "callable", target, "not allowed in metadata" if in_metadata else _target_problem(target))
        if config.get("_mode_", "default") != "default":
            self.note((*at, "_mode_"), "mode", config["_mode_"], 'only "default" is allowed')
        if not isinstance(config.get("_disabled_", False), bool):
            self.note((*at, "_disabled_"), "argument", config["_disabled_"], "only true or false is allowed")
        rules = {**ARGUMENTS["*"], **(ARGUMENTS.get(target, {}) if isinstance(target, str) else {})}
        for name, value in config.items():
            if str(name).startswith("_") and name not in _SPECIAL_KEYS:
                self.note((*at, str(name)), "argument", value, "arguments that start with _ are not allowed")
            elif name in rules and not self.is_one_of(value, rules[name]):
                self.note((*at, name), "argument", value, f"only {', '.join(map(repr, rules[name]))} allowed")
            elif name == "bundle_root" and value != "@bundle_root":
                self.note((*at, name), "argument", value, "only '@bundle_root' allowed")
        if isinstance(target, str) and target in PLACES:
            self.place(config, PLACES[target], at)

    def place(self, config: Mapping[str, Any], argument: str, at: tuple[str, ...]) -> None:
        # The defaults of MONAI are folders in the current directory; medseg's components have no default.
        value = config.get(argument, "" if config["_target_"].startswith("monai.") else "@output_dir")
        if value != "@output_dir" and not self.is_inside(value):
            reason = f"output must go to @output_dir, or to a folder from {_INSIDE} with root @bundle_root"
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
            # Each reference once: nested lists of references would take exponential time.
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
        return "must be the full dotted name of a component"
    if target in _TARGETS:
        return ""
    if (now := current_target(target)) is not None:
        return f"renamed to {now} in medseg {__version__}; run `medseg bundle build` on the bundle's folder"
    return "not on the list of allowed components"


def _forbidden(configs: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    parts = {name: {_METADATA: config} if _is_metadata(name) else config for name, config in configs.items()}
    # MONAI sets the metadata after the configs and overwrites their entry.
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
        "\n".join([f"Bundle {_shown(bundle)} was not started: it contains executable code and is not trusted", *lines])
        + f"\n{_inspect(bundle)} lists everything it would execute, without executing it, and prints its SHA-256. "
        "If you trust all of it, repeat the command with --trust SHA256."
    )


def _inspect(bundle: str) -> str:
    return f"`medseg bundle inspect {_shown(bundle)[1:-1]}`"


def _shown(text: str, limit: int = 100) -> str:
    """Quote text with control and non-ASCII characters escaped, cut to `limit` characters."""
    quoted = ascii(text if len(text) <= limit else text[:limit])
    return quoted if len(text) <= limit else f"{quoted[:-1]}...{quoted[-1]}"


def _files(root: Path) -> Iterator[tuple[str, Path]]:
    """Yield every file and link below `root` with its relative path, in a fixed order."""

    def fail(error: OSError) -> None:
        raise BundleError(f"Cannot read the bundle {root}: {error}.") from error

    paths = []
    for folder, folders, files in os.walk(root, onerror=fail):
        links = [name for name in folders if Path(folder, name).is_symlink()]
        paths += [Path(folder, name) for name in (*files, *links)]
    return iter(sorted((path.relative_to(root).as_posix(), path) for path in paths))


def _file_problem(root: Path, name: str, path: Path) -> str:
    if problem := _outside(root, path):
        return problem
    if path.is_symlink() and path.is_dir():
        return "a link to a folder, which could make copying endless"
    if name.lower().endswith(_IMPORTABLE):
        return "a file that Python could import"
    if name.lower().split("/")[0] == "configs" and not name.lower().endswith(".json"):
        return "not a JSON file, as required in configs"
    return ""


def _outside(root: Path, path: Path) -> str:
    try:
        if not path.resolve(strict=True).is_relative_to(root.resolve()):
            return "a link that leads outside the bundle"
        mode = path.stat().st_mode
    except (OSError, RuntimeError):  # older Pythons raise RuntimeError for a link to itself
        return "a broken link"
    return "" if stat.S_ISREG(mode) or stat.S_ISDIR(mode) else "not a regular file"
