"""The list of what a declarative bundle may name: every name is there, is its library's own, and has its rules."""

from __future__ import annotations

import inspect
import re
from pydoc import locate
from types import FunctionType

from medseg import components
from medseg.bundle.allowed import ALLOWED, ARGUMENTS, PLACES
from medseg.networks import NETWORKS


def targets() -> list[str]:
    return [
        f"{module}.{name}"
        for modules in ALLOWED.values()
        for module, names in modules.items()
        for name in names.split()
    ]


def test_every_part_and_every_network_of_medseg_may_be_named():
    ours = {target.removeprefix("medseg.components.") for target in targets() if target.startswith("medseg.")}
    assert ours == set(components.__all__)
    assert set(NETWORKS) < ours


def test_the_namespace_of_configs_reaches_nothing_but_its_list():
    reachable = {name for name in vars(components) if not name.startswith("_")}
    assert not reachable
    for name in ("_import_module", "_networks", "__getattr__"):
        assert f"medseg.components.{name}" not in targets()


def test_every_allowed_name_of_a_library_is_one_of_its_own_classes_or_functions():
    owners = {"monai": ("monai",), "ignite": ("ignite",), "torch": ("torch",)}
    for target in targets():
        package = target.split(".")[0]
        if package == "medseg":
            continue
        found = locate(target)
        assert isinstance(found, type | FunctionType), target
        assert found.__module__.split(".")[0] in owners[package], target


def test_parts_that_take_a_folder_to_write_to_have_a_place():
    folders = re.compile(r"(?:output|save|log|cache)_dir")
    found = {
        target: argument
        for target in targets()
        if not target.startswith("torch")
        for argument in inspect.signature(locate(target)).parameters
        if folders.fullmatch(argument)
    }
    assert found == PLACES


def test_no_allowed_name_is_listed_twice():
    assert len(targets()) == len(set(targets()))


def test_arguments_known_to_import_download_or_unpickle_have_a_rule():
    risky = re.compile(
        r"reader|writer|pretrained\w*|allow_pickle|pickle_module|weights_only|compile_kwargs|backbone|\w+_cls|"
        r"\w*url\w*|\w*download\w*|\w*hub\w*|\w*expression\w*|\w*script\w*|\w*command\w*"
    )
    checked = 0
    for target in targets():
        if target.startswith("torch"):
            continue
        for argument in inspect.signature(locate(target)).parameters:
            if risky.fullmatch(argument):
                checked += 1
                assert argument in {**ARGUMENTS["*"], **ARGUMENTS.get(target, {})}, f"{target}({argument}=)"
    assert checked > 5
