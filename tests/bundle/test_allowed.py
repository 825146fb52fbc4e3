"""The list of what a declarative bundle may name: every name is there, is its library's own, and has its rules."""

from __future__ import annotations

import inspect
import re
from pydoc import locate
from types import FunctionType

import pytest

from medseg.bundle.allowed import ALLOWED, ARGUMENTS, MEDSEG, PLACES


def targets() -> list[str]:
    return [
        f"{module}.{name}"
        for modules in ALLOWED.values()
        for module, names in modules.items()
        for name in names.split()
    ]


@pytest.mark.parametrize("room", MEDSEG)
def test_the_listed_parts_of_medseg_are_what_the_room_exports(room):
    module = locate(room)
    assert set(MEDSEG[room].split()) <= set(module.__all__)
    for name in MEDSEG[room].split():
        assert getattr(module, name).__module__.startswith(room)


def test_every_network_is_allowed_in_configs():
    from medseg.networks import NETWORKS

    assert {network.__name__ for network in NETWORKS} == set(MEDSEG["medseg.networks"].split())


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
