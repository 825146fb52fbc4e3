import nibabel as nib
import numpy as np
import pytest

from medseg.errors import GeometryError
from medseg.io import Grid, grid_difference, same_grid
from medseg.io.geometry import to_affine4


def rotation(axis, degrees):
    """Rotate around `axis` (Rodrigues)."""
    x, y, z = np.asarray(axis, float) / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    angle = np.radians(degrees)
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def affine(matrix, spacing=(1, 1, 1), origin=(0, 0, 0)):
    full = np.eye(4)
    full[:3, :3] = np.asarray(matrix) * spacing
    full[:3, 3] = origin
    return full


def changed(index, value):
    result = np.diag([2.0, 3.0, 4.0, 1.0])
    result[index] = value
    return result


@pytest.mark.parametrize("degrees", [0, 9, 30, 80])
@pytest.mark.parametrize("flip", [(1, 1, 1), (-1, 1, 1), (-1, -1, 1)])
def test_rounded_oblique_affines_pass_and_agree_with_nibabel(degrees, flip):
    matrix = affine(rotation((1, 2, 3), degrees) * flip, (0.7, 0.7, 5), (-120.5, 80, 33)).astype(np.float32)
    grid = Grid((8, 9, 10), matrix).check("a.nii")
    assert grid.orientation == "".join(nib.aff2axcodes(matrix))
    assert np.allclose(grid.spacing, nib.affines.voxel_sizes(matrix))


def test_describe_shows_shape_spacing_and_orientation():
    assert Grid((3, 4, 5), np.diag([-0.5, -0.75, 2, 1])).describe() == "3 x 4 x 5 voxels of 0.5 x 0.75 x 2 mm, LPS"
    assert Grid((3, 4), np.eye(4)).describe() == "3 x 4 voxels of 1 x 1 mm, RA"
    assert Grid((3, 4, 5), np.full((4, 4), np.nan)).describe().endswith("?")


def test_a_grid_cannot_be_changed_afterwards():
    source = np.eye(4)
    grid = Grid((3, 4, 5), source)
    source[0, 0] = 9
    assert grid.affine[0, 0] == 1
    with pytest.raises(ValueError, match="read-only"):
        grid.affine[0, 0] = 9


@pytest.mark.parametrize(
    ("matrix", "part"),
    [
        (changed((0, 3), np.nan), "nan"),
        (changed((1, 1), np.inf), "inf"),
        (np.diag([0.0, 0, 0, 1]), "spacing of 0 mm along voxel axis 0"),
        (changed((1, 1), 0), "spacing of 0 mm along voxel axis 1"),
        (changed((2, 2), 5e-5), "spacing of 5e-05 mm along voxel axis 2"),
        (changed((2, 2), 1001), "spacing of 1001 mm along voxel axis 2"),
        (changed((2, 2), 1e300), "spacing of"),
        (changed((3, 0), 1), "last row is [1. 0. 0. 1.]"),
        (changed((slice(0, 3), 1), [2, 0, 0]), "singular"),
        (changed((0, 1), 3 * np.tan(np.radians(2))), "88.00 degrees"),
    ],
)
def test_unusable_affines_are_refused_with_file_and_value(matrix, part):
    with pytest.raises(GeometryError) as error:
        Grid((3, 4, 5), matrix).check("scan.nii")
    assert "scan.nii" in str(error.value)
    assert part in str(error.value)


@pytest.mark.parametrize(("shear", "passes"), [(5e-4, True), (2e-3, False)])
def test_shear_is_tolerated_up_to_a_thousandth(shear, passes):
    grid = Grid((3, 4, 5), changed((0, 1), 3 * shear))
    if passes:
        assert grid.check("a.nii") is grid
    else:
        with pytest.raises(GeometryError, match="sheared"):
            grid.check("a.nii")


@pytest.mark.parametrize("shape", [(), (0, 3, 4), (3, -1, 4)])
def test_shapes_without_voxels_are_refused(shape):
    with pytest.raises(GeometryError, match=r"a\.nii has the invalid shape"):
        Grid(shape, np.eye(4)).check("a.nii")


def test_too_many_voxels_are_refused_by_default_and_by_choice():
    with pytest.raises(GeometryError, match="35,937,000,000,000 voxels"):
        Grid((33000, 33000, 33000), np.eye(4)).check("a.nii")
    with pytest.raises(GeometryError, match="limit is 59"):
        Grid((3, 4, 5), np.eye(4)).check("a.nii", max_voxels=59)
    assert Grid((3, 4, 5), np.eye(4)).check("a.nii", max_voxels=60)


def test_an_affine_of_another_shape_is_refused():
    with pytest.raises(GeometryError, match=r"\(3, 3\)"):
        Grid((3, 4), np.eye(3))


def test_float32_rounding_leaves_grids_the_same():
    exact = affine(rotation((1, 0, 2), 20), (0.7, 0.7, 3), (-200, 150, -900))
    a, b = (Grid((512, 512, 300), matrix) for matrix in (exact, exact.astype(np.float32)))
    assert same_grid(a, b)
    assert grid_difference(a, b) == ""


def test_grids_differ_by_shape_shift_flip_and_nan():
    grid = Grid((3, 4, 5), np.diag([2.0, 3.0, 4.0, 1.0]))
    assert "(3, 4, 5) and (3, 4, 6)" in grid_difference(grid, Grid((3, 4, 6), grid.affine))
    assert "0.5 mm" in grid_difference(grid, Grid((3, 4, 5), changed((0, 3), 0.5)))
    assert same_grid(grid, Grid((3, 4, 5), changed((0, 3), 0.19)))
    assert "8 mm" in grid_difference(grid, Grid((3, 4, 5), changed((0, 0), -2)))
    assert not same_grid(grid, Grid((3, 4, 5), changed((0, 0), np.nan)))


def test_small_affines_of_pictures_become_full_ones():
    assert np.array_equal(
        to_affine4([[2, 0, 5], [0, 3, 6], [0, 0, 1]]), [[2, 0, 0, 5], [0, 3, 0, 6], [0, 0, 1, 0], [0, 0, 0, 1]]
    )
    assert np.array_equal(to_affine4(np.diag([1, 2, 3, 1])), np.diag([1, 2, 3, 1]))
