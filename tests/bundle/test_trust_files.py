"""The trust check of bundle folders: reading configs, files that could run, fingerprints and what they vouch for."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from medseg import files
from medseg.bundle import trust
from medseg.errors import BundleError, UntrustedBundleError

DECLARATIVE = {
    "learning_rate": 0.001,
    "loss": {"_target_": "monai.losses.DiceCELoss", "softmax": True, "to_onehot_y": True},
}
METADATA = {"version": "0.1.0", "schema": "https://example.org/schema.json"}


@pytest.fixture
def bundle(tmp_path):
    root = tmp_path / "foreign"
    write(root, "configs/train.json", json.dumps(DECLARATIVE))
    write(root, "configs/metadata.json", json.dumps(METADATA))
    write(root, "models/model.pt", "weights")
    write(root, "docs/README.md", "# Foreign")
    return root


def write(root: Path, name: str, text: str) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1, "a": "$x"}', "duplicate key"),
        ('{"b": {"a": 1, "\\u0061": 2}}', "duplicate key"),
        ('{"a": NaN}', "finite"),
        ('{"a": -Infinity}', "finite"),
        ('{"a": 1e999}', "finite"),
        ("[1]", "JSON object"),
        ("{", "cannot read"),
        ('\ufeff{"a": 1}', "cannot read"),
        ('{"a": ' + "9" * 5000 + "}", "cannot read"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
        (" " * (files.MAX_CONFIG_BYTES + 1), "at most"),
    ],
    ids=[
        *("duplicate key", "escaped duplicate", "NaN", "infinity", "overflow", "list", "cut off", "byte order mark"),
        *("huge number", "nesting bomb", "huge file"),
    ],
)
def test_load_json_refuses_what_readers_may_read_differently(tmp_path, text, said):
    path = write(tmp_path, "train.json", text)
    with pytest.raises(BundleError, match=said) as caught:
        files.load_json(path)
    assert "train.json" in str(caught.value)


def test_load_json_refuses_what_is_not_utf8_text_in_a_file(tmp_path):
    (tmp_path / "latin.json").write_bytes('{"a": "é"}'.encode("latin-1"))
    os.mkfifo(tmp_path / "pipe.json")
    for name in ("latin.json", "pipe.json", "missing.json"):
        with pytest.raises(BundleError, match=name):
            files.load_json(tmp_path / name)


def test_load_json_reads_what_was_written(tmp_path):
    assert files.load_json(write(tmp_path, "train.json", json.dumps(DECLARATIVE))) == DECLARATIVE


def test_a_declarative_bundle_needs_no_trust(bundle):
    trust.require_trust(bundle, {"train.json": DECLARATIVE})


@pytest.mark.parametrize(
    "name",
    [
        *("scripts/net.py", "skimage/__init__.py", "torchio.abi3.so", "scripts/__pycache__/net.pyc", "Tool.PY"),
        *("configs/logging.conf", "configs/extra.yaml", "configs/train.json.bak"),
    ],
)
def test_a_file_that_could_run_is_refused(bundle, name):
    write(bundle, name, "")
    assert [f.where for f in trust.find_files(bundle)] == [name]
    with pytest.raises(UntrustedBundleError, match=re.escape(name)):
        trust.require_trust(bundle, {"train.json": DECLARATIVE})


def test_metadata_is_checked_though_nobody_handed_it_in(bundle, tmp_path):
    marker = tmp_path / "marker"
    write(bundle, "configs/metadata.json", json.dumps({"version": f"$open({marker.as_posix()!r}, 'w')"}))
    with pytest.raises(UntrustedBundleError, match=r"metadata\.json: _meta_::version"):
        trust.require_trust(bundle, {"train.json": DECLARATIVE})
    assert not marker.exists()


@pytest.mark.parametrize("target", ["../elsewhere.json", "/etc/hostname", "loop.json", "gone.json"])
def test_a_link_in_configs_that_leads_elsewhere_is_refused_even_if_vouched_for(bundle, target):
    write(bundle, "../elsewhere.json", "{}")
    (bundle / "configs" / "loop.json").symlink_to("loop.json" if target == "loop.json" else f"../{target}")
    with pytest.raises(UntrustedBundleError, match=r"loop\.json"):
        trust.require_trust(bundle, {"train.json": DECLARATIVE})
    with pytest.raises(BundleError, match=r"loop\.json.*link"):
        trust.fingerprint(bundle)


def test_configs_may_not_be_a_link_to_another_folder_of_the_bundle(bundle):
    (bundle / "configs").rename(bundle / "hidden")
    write(bundle, "hidden/logging.conf", "")
    (bundle / "configs").symlink_to("hidden")
    assert [f.where for f in trust.find_files(bundle)] == ["configs"]


def test_a_link_to_a_folder_of_the_bundle_is_refused(bundle):
    """Copied with what it leads to, it would never end."""
    (bundle / "docs" / "again").symlink_to(".")
    assert [f.where for f in trust.find_files(bundle)] == ["docs/again"]
    with pytest.raises(UntrustedBundleError, match="link to a folder"):
        trust.require_trust(bundle, {"train.json": DECLARATIVE})


def test_metadata_that_is_handed_in_is_what_counts(bundle):
    write(bundle, "configs/metadata.json", json.dumps({"version": "$print()"}))
    trust.require_trust(bundle, {"train.json": DECLARATIVE, "metadata.json": METADATA})


def test_a_pipe_is_refused_and_not_read(bundle):
    os.mkfifo(bundle / "models" / "model.ts")
    with pytest.raises(BundleError, match="not a regular file"):
        trust.fingerprint(bundle)


def test_the_fingerprint_is_of_the_content_and_not_of_the_place(bundle, tmp_path):
    assert re.fullmatch("[0-9a-f]{64}", trust.fingerprint(bundle))
    shutil.copytree(bundle, tmp_path / "copy")
    assert trust.fingerprint(tmp_path / "copy") == trust.fingerprint(bundle)
    (tmp_path / "link").symlink_to(bundle)
    assert trust.fingerprint(tmp_path / "link") == trust.fingerprint(bundle)


@pytest.mark.parametrize(
    "change",
    [
        lambda root: write(root, "configs/train.json", json.dumps(DECLARATIVE) + "\n"),
        lambda root: write(root, "configs/new.json", "{}"),
        lambda root: write(root, "models/model.pt", "other weights"),
        lambda root: write(root, "docs/README.md", "# Other"),
        lambda root: write(root, "scripts/net.py", ""),
        lambda root: write(root, ".hidden", ""),
        lambda root: (root / "models" / "model.pt").rename(root / "models" / "model2.pt"),
        lambda root: (root / "docs" / "README.md").unlink(),
        lambda root: (root / "models" / "best.pt").symlink_to("model.pt"),
    ],
    ids=["config", "new config", "weights", "docs", "script", "hidden file", "renamed", "removed", "link inside"],
)
def test_any_change_of_a_bundle_changes_its_fingerprint(bundle, change):
    before = trust.fingerprint(bundle)
    change(bundle)
    assert trust.fingerprint(bundle) != before


def test_a_vouched_for_program_passes_until_it_changes(bundle):
    program = {"train.json": {"run": "$print('hello')"}}
    write(bundle, "configs/train.json", json.dumps(program["train.json"]))
    write(bundle, "scripts/net.py", "")
    vouched = trust.fingerprint(bundle)
    trust.require_trust(bundle, program, vouched)
    trust.require_trust(bundle, program, vouched.upper())
    write(bundle, "scripts/net.py", "import os")
    with pytest.raises(UntrustedBundleError, match="added, removed or changed") as caught:
        trust.require_trust(bundle, program, vouched)
    assert trust.fingerprint(bundle) not in str(caught.value)
    assert "medseg bundle inspect foreign" in str(caught.value)


@pytest.mark.parametrize("given", ["", "yes", "0" * 63, "0" * 64 + "\n", "z" * 64])
def test_trust_that_is_no_fingerprint_is_refused(bundle, given):
    with pytest.raises(UntrustedBundleError, match="64 hexadecimal digits"):
        trust.require_trust(bundle, {"train.json": DECLARATIVE}, given)


def test_a_wrong_fingerprint_is_refused_even_for_a_declarative_bundle(bundle):
    with pytest.raises(UntrustedBundleError, match="does not match --trust"):
        trust.require_trust(bundle, {"train.json": DECLARATIVE}, "0" * 64)


def test_a_bundle_folder_that_is_missing_is_no_declarative_bundle(tmp_path):
    with pytest.raises(BundleError, match="Cannot read the bundle"):
        trust.require_trust(tmp_path / "missing", {"train.json": DECLARATIVE})
