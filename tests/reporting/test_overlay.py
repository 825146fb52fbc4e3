"""Pictures of masks: the right slices, the right way round, in true proportions."""

from __future__ import annotations

import itertools
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from medseg.errors import CaseError, GeometryError, OutputError, RequestError
from medseg.reporting import overlay
from medseg.reporting.drawing import PALETTE, Panel, draw_panel, legend_entries, volume_text
from medseg.reporting.overlay import draw_image, draw_volume, write_overlay

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data beside the project")
SKY, ORANGE = (tuple(int(c) for c in PALETTE[index]) for index in (0, 1))


def save_nifti(path, array, affine):
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def affine_for(spacing=(1.0, 1.0, 1.0), degrees=0.0, origin=(-20.0, 11.0, 5.0)):
    angle = np.deg2rad(degrees)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag(spacing)
    affine[:3, 3] = origin
    return affine


@pytest.fixture
def volume(tmp_path):
    """A noisy block of 20 x 24 x 16 voxels with one label off center, and its files."""
    image = np.random.default_rng(0).normal(100, 20, (20, 24, 16)).astype(np.float32)
    mask = np.zeros(image.shape, np.uint8)
    mask[3:8, 14:20, 9:13] = 1
    image[mask > 0] += 80
    affine = affine_for((1.5, 1.5, 3.0), degrees=7)
    return save_nifti(tmp_path / "scan.nii.gz", image, affine), save_nifti(tmp_path / "mask.nii.gz", mask, affine)


@pytest.fixture
def panels(monkeypatch):
    """The panels that the page is made of, caught on their way."""
    caught: list[Panel] = []
    original = overlay.compose

    def catch(title, given, legend, note):
        caught.extend(given)
        return original(title, given, legend, note)

    monkeypatch.setattr(overlay, "compose", catch)
    return caught


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def count_color(rgb, color):
    return int((np.abs(rgb - color).max(axis=-1) <= 2).sum())


# --- volumes


def test_a_volume_gives_one_readable_png(volume, tmp_path):
    out = write_overlay(*volume, tmp_path / "new" / "overlay.png", labels={1: "liver"})
    rgb = pixels(out)
    assert out == tmp_path / "new" / "overlay.png"
    assert count_color(rgb, SKY) > 200
    assert 400 < rgb.shape[0] < 700
    assert rgb.shape[1] < 2000
    assert [path.name for path in out.parent.iterdir()] == ["overlay.png"]


def test_the_same_input_gives_the_same_bytes(volume, tmp_path):
    first = write_overlay(*volume, tmp_path / "a.png")
    second = write_overlay(*volume, tmp_path / "b.png")
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, -1, 1), (1, -1, -1), (-1, 1, -1)])
def test_radiological_view_whatever_the_storage_order(panels, order, signs):
    """A marker at the right, anterior, superior corner shows at the top left of axial and coronal slices."""
    shape = (9, 10, 11)
    mask = np.zeros(shape, np.uint8)
    mask[7, 8, 9] = 1  # in RAS: right, anterior, superior
    affine = np.eye(4)
    stored = mask.transpose(order)
    columns = np.eye(3)[:, order]
    for axis, sign in enumerate(signs):
        if sign < 0:
            stored = np.flip(stored, axis)
            affine[:3, 3] += columns[:, axis] * (stored.shape[axis] - 1)
            columns[:, axis] *= -1
    affine[:3, :3] = columns
    world = affine @ [*np.argwhere(stored)[0], 1]
    np.testing.assert_allclose(world[:3], (7, 8, 9))
    draw_volume(np.zeros(stored.shape), stored, affine, title="marker")
    axial, coronal, sagittal = panels
    assert [panel.letters for panel in panels] == ["RLAP", "RLSI", "APSI"]
    assert np.argwhere(axial.marks[0]).tolist() == [[10 - 1 - 8, 9 - 1 - 7]]  # anterior on top, right on the left
    assert np.argwhere(coronal.marks[0]).tolist() == [[11 - 1 - 9, 9 - 1 - 7]]  # superior on top, right on the left
    assert np.argwhere(sagittal.marks[0]).tolist() == [[11 - 1 - 9, 10 - 1 - 8]]  # superior on top, anterior left
    assert [panel.caption for panel in panels] == ["axial  10 / 11", "coronal  9 / 10", "sagittal  8 / 9"]


def test_slices_are_where_most_foreground_is(panels):
    mask = np.zeros((12, 12, 12), np.uint8)
    mask[2:4, 5:9, 4:10] = 1
    mask[2:9, 6, 4:10] = 1
    mask[2:4, 5:9, 8] = 1
    mask[2:9, 5:9, 8] = 1
    draw_volume(np.zeros(mask.shape), mask, np.eye(4), title="t")
    assert [panel.caption for panel in panels] == ["axial  9 / 12", "coronal  7 / 12", "sagittal  4 / 12"]


def test_a_small_lesion_is_not_outvoted_by_a_large_organ(panels):
    mask = np.zeros((20, 20, 20), np.uint8)
    mask[2:18, 2:18, 2:18] = 1
    mask[5, 5, 5] = 2
    draw_volume(np.zeros(mask.shape), mask, np.eye(4), title="t")
    assert all((panel.marks[0] == 2).sum() == 1 for panel in panels)


@pytest.mark.parametrize("with_truth", [False, True])
def test_an_empty_mask_shows_the_middle_or_the_truth(panels, with_truth):
    mask = np.zeros((10, 12, 14), np.uint8)
    truth = mask.copy()
    truth[1, 2, 3] = 1
    draw_volume(np.zeros(mask.shape), mask, np.eye(4), title="t", truth=truth if with_truth else None)
    expected = ["axial  4 / 14", "coronal  3 / 12", "sagittal  2 / 10"]
    middle = ["axial  8 / 14", "coronal  7 / 12", "sagittal  6 / 10"]
    assert [panel.caption for panel in panels] == (expected if with_truth else middle)


@pytest.mark.parametrize("spacing", [(1, 1, 1), (0.7, 0.7, 5.0), (3.0, 1.0, 0.5)])
def test_proportions_are_those_of_the_body(panels, spacing):
    shape = (40, 30, 20)
    draw_volume(np.zeros(shape), np.zeros(shape, np.uint8), affine_for(spacing), title="t")
    mm = np.multiply(shape, spacing)
    for panel, (row, column) in zip(panels, ((1, 0), (2, 0), (2, 1)), strict=True):
        width, height = draw_panel(panel).size
        assert height / width == pytest.approx(mm[row] / mm[column], rel=0.02)
        assert max(height, width) <= 640
        assert max(height, width) >= 150


def test_a_volume_of_one_slice_has_one_panel(panels):
    draw_volume(np.zeros((30, 20, 1)), np.ones((30, 20, 1), np.uint8), np.eye(4), title="t")
    assert [panel.caption for panel in panels] == ["axial  1 / 1"]


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 1, 1), (2, 2, 2), (200, 3, 3)])
def test_tiny_and_thin_volumes_are_drawn(shape):
    page = draw_volume(np.zeros(shape), np.ones(shape, np.uint8), np.eye(4), title="t")
    assert min(page.size) > 50


def test_window_sets_black_and_white(panels):
    image = np.random.default_rng(3).uniform(-1000, 1000, (10, 10, 10))
    draw_volume(image, np.zeros(image.shape, np.uint8), np.eye(4), title="t", window=(-160, 240))
    for panel in panels:
        assert (panel.pixels.min(), panel.pixels.max()) == (0, 255)
    axial = image[:, :, 5].T[::-1, ::-1]
    expected = np.rint(255 * np.clip((axial + 160) / 400, 0, 1))
    np.testing.assert_array_equal(panels[0].pixels, expected)


def test_outliers_do_not_darken_the_picture(panels):
    image = np.random.default_rng(1).uniform(0, 100, (20, 20, 20))
    image[0, 0, 0] = 1e6
    draw_volume(image, np.zeros(image.shape, np.uint8), np.eye(4), title="t")
    assert panels[0].pixels.mean() > 100


@pytest.mark.parametrize("value", [np.nan, np.inf, 5.0])
def test_images_without_contrast_or_numbers_are_drawn_black(panels, value):
    draw_volume(np.full((6, 6, 6), value), np.zeros((6, 6, 6), np.uint8), np.eye(4), title="t")
    assert all(panel.pixels.max() == 0 for panel in panels)


def test_truth_is_drawn_apart_from_the_mask(volume, tmp_path):
    image, mask = volume
    moved = np.roll(np.asarray(nib.load(mask).dataobj), 2, axis=1)
    truth = save_nifti(tmp_path / "truth.nii.gz", moved, nib.load(mask).affine)
    plain = pixels(write_overlay(image, mask, tmp_path / "plain.png"))
    both = pixels(write_overlay(image, mask, tmp_path / "both.png", truth_path=truth))
    white = count_color(both, (255, 255, 255)) - count_color(plain, (255, 255, 255))
    assert white > 100
    assert count_color(both, SKY) > 100


def test_a_contour_under_an_equal_truth_still_shows():
    mark = np.zeros((30, 30), np.uint16)
    mark[8:22, 8:22] = 1
    gray = np.full(mark.shape, 90, np.uint8)
    alone = np.asarray(draw_panel(Panel(gray, [mark], None, "", ""))).astype(int)
    under = np.asarray(draw_panel(Panel(gray, [mark, mark], None, "", ""))).astype(int)
    assert 0.4 * count_color(alone, SKY) < count_color(under, SKY) < count_color(alone, SKY)


def test_labels_lie_exactly_on_their_voxels():
    mark = np.zeros((6, 5), np.uint16)
    mark[2:4, 1:3] = 2
    drawn = np.asarray(draw_panel(Panel(np.zeros(mark.shape, np.uint8), [mark], None, "", ""))).astype(int)
    scale = drawn.shape[0] // 6
    assert drawn.shape[:2] == (6 * scale, 5 * scale)
    inside = drawn.max(axis=-1) > 0
    np.testing.assert_array_equal(inside, np.kron(mark > 0, np.ones((scale, scale), bool)))
    assert count_color(drawn, ORANGE) > 4 * scale


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.float64])
def test_label_files_of_any_number_type_are_read(volume, tmp_path, dtype):
    image, mask = volume
    loaded = nib.load(mask)
    other = save_nifti(tmp_path / "other.nii.gz", np.asarray(loaded.dataobj).astype(dtype), loaded.affine)
    expected = write_overlay(image, mask, tmp_path / "a.png").read_bytes()
    assert write_overlay(image, other, tmp_path / "b.png").read_bytes() == expected


def test_the_first_channel_of_a_volume_of_several_is_shown(volume, tmp_path):
    image, mask = volume
    loaded = nib.load(image)
    first = np.asarray(loaded.dataobj)
    (tmp_path / "sub").mkdir()
    several = save_nifti(tmp_path / "sub" / "scan.nii.gz", np.stack([first, -first], axis=-1), loaded.affine)
    expected = write_overlay(image, mask, tmp_path / "a.png").read_bytes()
    assert write_overlay(several, mask, tmp_path / "b.png").read_bytes() == expected


def test_only_the_file_name_is_shown_never_its_folder(volume, tmp_path, monkeypatch):
    seen = []
    original = overlay.compose
    monkeypatch.setattr(overlay, "compose", lambda title, *rest: seen.append(title) or original(title, *rest))
    write_overlay(*volume, tmp_path / "o.png")
    assert seen == ["scan.nii.gz"]


# --- pictures


@pytest.fixture
def picture(tmp_path):
    rgb = np.random.default_rng(2).integers(60, 200, (50, 70, 3)).astype(np.uint8)
    mask = np.zeros((50, 70), np.uint8)
    mask[10:30, 20:40] = 1
    Image.fromarray(rgb).save(tmp_path / "tissue.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return tmp_path / "tissue.png", tmp_path / "mask.png"


def test_a_picture_is_shown_as_it_lies(picture, tmp_path, panels):
    write_overlay(*picture, tmp_path / "o.png")
    assert len(panels) == 1
    with Image.open(picture[0]) as original:
        np.testing.assert_array_equal(panels[0].pixels, np.asarray(original))
    assert np.argwhere(panels[0].marks[0]).min(axis=0).tolist() == [10, 20]
    assert panels[0].letters == ""


@pytest.mark.parametrize("mode", ["1", "L255", "P", "RGB", "I;16"])
def test_mask_pictures_of_usual_kinds_mean_the_same(picture, tmp_path, mode):
    image, mask_path = picture
    mask = pixels(mask_path)[..., 0].astype(np.uint8)
    white = Image.fromarray(mask * 255)
    palette = Image.fromarray(mask).convert("P")
    palette.putdata(mask.ravel().tolist())
    made = {
        "1": white.convert("1"),
        "L255": white,
        "P": palette,
        "RGB": Image.fromarray(np.stack([mask] * 3, axis=-1)),
        "I;16": Image.fromarray(mask.astype(np.uint16)),
    }[mode]
    made.save(tmp_path / "other.png")
    expected = write_overlay(image, mask_path, tmp_path / "a.png").read_bytes()
    assert write_overlay(image, tmp_path / "other.png", tmp_path / "b.png").read_bytes() == expected


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "I;16", "CMYK"])
def test_pictures_of_usual_kinds_are_drawn(picture, tmp_path, mode):
    with Image.open(picture[0]) as original:
        if mode == "I;16":
            converted = Image.fromarray(np.asarray(original.convert("L")).astype(np.uint16) * 200)
        else:
            converted = original.convert(mode)
    path = tmp_path / ("other.tif" if mode == "CMYK" else "other.png")
    converted.save(path)
    assert count_color(pixels(write_overlay(path, picture[1], tmp_path / "o.png")), SKY) > 100


def test_large_pictures_are_reduced(tmp_path):
    page = draw_image(np.zeros((3000, 2000), np.uint8), np.zeros((3000, 2000), np.uint8), title="big")
    assert max(page.size) < 1200


# --- legend


def meters(count):
    return f"{count} units"


def texts(*arguments):
    return [entry.text for entry in legend_entries(*arguments)]


def test_legend_names_and_measures_each_label():
    assert texts([np.array([9, 5, 0, 2])], {0: "background", 1: "lung", 2: "liver"}, meters) == [
        "lung  5 units",
        "liver  none",
        "label 3  2 units",
    ]


def test_legend_compares_with_the_reference():
    assert texts([np.array([9, 5]), np.array([9, 4, 7])], {1: "lung", 2: "liver"}, meters) == [
        "lung  5 units (reference 4 units)",
        "liver  none (reference 7 units)",
        "reference",
    ]


def test_many_unnamed_labels_are_counted_as_objects():
    assert texts([np.array([9, *[2] * 30])], None, meters) == ["30 objects, 60 units"]


def test_many_named_labels_show_the_largest():
    labels = {value: f"organ {value}" for value in range(1, 31)}
    shown = texts([np.arange(31)], labels, meters)
    assert shown[0] == "organ 30  30 units"
    assert shown[-1] == "+ 18 more"
    assert len(shown) == 13


def test_an_empty_mask_says_so():
    assert texts([np.array([9])], None, meters) == ["empty mask"]


@pytest.mark.parametrize(
    ("cubic_mm", "text"),
    [(0.5, "0.50 mm³"), (12.34, "12.3 mm³"), (999, "999 mm³"), (1000, "1.00 mL"), (1_234_000, "1,234 mL")],
)
def test_volumes_have_a_fitting_unit(cubic_mm, text):
    assert volume_text(cubic_mm) == text


# --- refusals


def test_a_mask_of_another_shape_is_refused(volume, tmp_path):
    mask = save_nifti(tmp_path / "other.nii.gz", np.zeros((5, 5, 5), np.uint8), nib.load(volume[0]).affine)
    with pytest.raises(GeometryError, match=r"other\.nii\.gz.*\(5, 5, 5\)"):
        write_overlay(volume[0], mask, tmp_path / "o.png")
    assert not (tmp_path / "o.png").exists()


def test_a_mask_in_another_place_is_refused(volume, tmp_path):
    image, mask = volume
    affine = nib.load(mask).affine.copy()
    affine[0, 3] += 2
    moved = save_nifti(tmp_path / "moved.nii.gz", np.asarray(nib.load(mask).dataobj), affine)
    with pytest.raises(GeometryError, match=r"moved\.nii\.gz"):
        write_overlay(image, moved, tmp_path / "o.png")
    with pytest.raises(GeometryError, match=r"moved\.nii\.gz"):
        write_overlay(image, mask, tmp_path / "o.png", truth_path=moved)


@pytest.mark.parametrize("value", [0.5, -1, 70000, np.nan])
def test_what_is_no_label_map_is_refused(volume, tmp_path, value):
    image, mask = volume
    array = np.asarray(nib.load(mask).dataobj).astype(np.float32)
    array[0, 0, 0] = value
    other = save_nifti(tmp_path / "soft.nii.gz", array, nib.load(mask).affine)
    with pytest.raises(CaseError, match=r"whole numbers|integers"):
        write_overlay(image, other, tmp_path / "o.png")


def test_a_mask_of_several_channels_is_refused(volume, tmp_path):
    loaded = nib.load(volume[1])
    array = np.asarray(loaded.dataobj)
    several = save_nifti(tmp_path / "several.nii.gz", np.stack([array, array], axis=-1), loaded.affine)
    with pytest.raises(CaseError, match=r"several\.nii\.gz"):
        write_overlay(volume[0], several, tmp_path / "o.png")


def test_a_color_mask_is_refused(picture, tmp_path):
    with pytest.raises(CaseError, match=r"tissue\.png is a color image"):
        write_overlay(picture[0], picture[0], tmp_path / "o.png")


@pytest.mark.parametrize("name", ["absent.nii.gz", "absent.png"])
def test_missing_files_are_named(tmp_path, name):
    with pytest.raises(CaseError, match=rf"{name} cannot be read \(no such file\)"):
        write_overlay(tmp_path / name, tmp_path / name, tmp_path / "o.png")


@pytest.mark.parametrize("name", ["broken.nii.gz", "broken.nii", "broken.png", "broken.tif", "broken.xyz"])
def test_damaged_files_are_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x89PNG\r\n\x1a\n garbage")
    with pytest.raises(CaseError, match=name):
        write_overlay(tmp_path / name, tmp_path / name, tmp_path / "o.png")


def test_truncated_volumes_are_named(volume, tmp_path):
    cut = tmp_path / "cut.nii.gz"
    cut.write_bytes(volume[0].read_bytes()[:3000])
    with pytest.raises(CaseError, match=r"cut\.nii\.gz"):
        write_overlay(cut, volume[1], tmp_path / "o.png")


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(CaseError, match="series"):
        write_overlay(tmp_path / "series", tmp_path / "series", tmp_path / "o.png")


def test_a_singular_affine_is_refused():
    with pytest.raises(GeometryError, match="t: its affine"):
        draw_volume(np.zeros((4, 4, 4)), np.zeros((4, 4, 4), np.uint8), np.diag([1, 1, 0, 1]), title="t")


@pytest.mark.parametrize("window", [(100, 100), (200, 100), (float("nan"), 1)])
def test_an_empty_window_is_refused(volume, tmp_path, window):
    with pytest.raises(RequestError, match="window="):
        write_overlay(*volume, tmp_path / "o.png", window=window)


def test_an_input_is_never_overwritten(picture):
    before = [path.read_bytes() for path in picture]
    for target in picture:
        with pytest.raises(OutputError, match="also an input"):
            write_overlay(*picture, target)
    assert [path.read_bytes() for path in picture] == before


@pytest.mark.parametrize("name", ["o.jpg", "o", "o.nii.gz"])
def test_only_png_is_written(volume, tmp_path, name):
    with pytest.raises(OutputError, match=r"\.png"):
        write_overlay(*volume, tmp_path / name)


def test_a_place_that_cannot_be_written_is_an_output_error(volume, tmp_path):
    (tmp_path / "o.png").mkdir()
    with pytest.raises(OutputError, match=r"o\.png"):
        write_overlay(*volume, tmp_path / "o.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mask.nii.gz", "o.png", "scan.nii.gz"]


# --- real data


@needs_data
@pytest.mark.data
def test_a_real_hippocampus_is_drawn(tmp_path, panels):
    name = "hippocampus_001.nii.gz"
    folder = DATA / "msd_hippocampus"
    label = folder / "labelsTr" / name
    labels = {1: "anterior", 2: "posterior"}
    write_overlay(folder / "imagesTr" / name, label, tmp_path / "o.png", truth_path=label, labels=labels)
    assert len(panels) == 3
    assert all(set(np.unique(panel.marks[0])) >= {0, 1} for panel in panels)
    assert (tmp_path / "o.png").stat().st_size > 20_000


@needs_data
@pytest.mark.data
def test_a_real_tissue_picture_is_drawn(tmp_path, panels):
    folder = DATA / "glas"
    out = write_overlay(folder / "images/train_1.png", folder / "labels/train_1.png", tmp_path / "o.png")
    assert panels[0].pixels.shape == (261, 387, 3)
    assert count_color(pixels(out), ORANGE) > 100
