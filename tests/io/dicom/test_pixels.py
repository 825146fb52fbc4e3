import numpy as np
import pytest
import SimpleITK as sitk
from pydicom.dataset import Dataset
from pydicom.pixels.decoders import JPEG2000LosslessDecoder
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRBigEndian, ImplicitVRLittleEndian, JPEG2000Lossless, RLELossless

from medseg.errors import CaseError
from medseg.io import load
from medseg.io.dicom import pixels

RNG = np.random.default_rng(0)
DEEP = RNG.integers(-2000, 3000, (6, 7), dtype="int16")


def itk(path):
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path))).reshape(6, 7).T


def loaded(path, **options):
    return load(path, spatial_dims=2, **options).numpy()[0]


@pytest.mark.parametrize("stored", [8, 10, 12, 15, 16])
@pytest.mark.parametrize("signed", [False, True])
def test_bits_beyond_those_in_use_are_cut_as_by_itk(slice_of, save_image, tmp_path, stored, signed):
    raw = RNG.integers(0, 65536, (6, 7), dtype="uint16")
    ds = slice_of(raw)
    ds.BitsStored, ds.HighBit, ds.PixelRepresentation = stored, stored - 1, int(signed)
    path = save_image(ds, tmp_path / "a.dcm")
    found = loaded(path)
    assert np.array_equal(found, itk(path))
    assert bool(found.min() < 0) is signed


@pytest.mark.parametrize(("dtype", "signed"), [("uint8", 0), ("int8", 1), ("uint16", 0), ("int16", 1), ("uint32", 0)])
def test_all_widths_of_values_are_read(slice_of, save_image, tmp_path, dtype, signed):
    limits = np.iinfo(dtype)
    raw = RNG.integers(limits.min, limits.max, (6, 7), dtype=dtype) >> (8 if dtype == "uint32" else 0)
    ds = slice_of(raw)
    ds.PixelRepresentation = signed
    assert np.array_equal(loaded(save_image(ds, tmp_path / "a.dcm")), raw.T)


@pytest.mark.parametrize("modality", ["CR", "CT"])
@pytest.mark.parametrize("signed", [False, True])
def test_monochrome1_is_inverted_where_values_are_for_display(slice_of, save_image, tmp_path, modality, signed):
    raw = RNG.integers(-2048, 2048, (6, 7), dtype="int16") if signed else RNG.integers(0, 4096, (6, 7), dtype="uint16")
    ds = slice_of(raw, modality=modality)
    ds.PhotometricInterpretation, ds.BitsStored, ds.HighBit = "MONOCHROME1", 12, 11
    path = save_image(ds, tmp_path / "a.dcm")
    found = loaded(path)
    assert np.array_equal(found, raw.T if modality == "CT" else (-1 if signed else 4095) - raw.T)
    if modality == "CR" and not signed:
        assert np.array_equal(found, itk(path))


def test_padding_stays_and_is_rescaled_like_the_rest(slice_of, save_image, tmp_path):
    raw = DEEP.copy()
    raw[0] = -2000
    ds = slice_of(raw)
    ds.add_new("PixelPaddingValue", "SS", -2000)
    ds.RescaleSlope, ds.RescaleIntercept = 1, -1024
    assert (loaded(save_image(ds, tmp_path / "a.dcm"))[:, 0] == -3024).all()


@pytest.mark.parametrize("first", [-1500, 0])
def test_a_modality_lut_counts_instead_of_the_rescale(slice_of, save_image, tmp_path, first):
    table = RNG.integers(0, 60000, 3000, dtype="uint16")
    ds = slice_of(DEEP)
    item = Dataset()
    item.add_new("LUTDescriptor", "SS", [3000, first, 16])
    item.add_new("LUTData", "OW", table.tobytes())
    item.ModalityLUTType = "US"
    ds.ModalityLUTSequence = Sequence([item])
    found = loaded(save_image(ds, tmp_path / "a.dcm"))
    assert np.array_equal(found, table[np.clip(DEEP.T.astype(int) - first, 0, 2999)])
    item.add_new("LUTData", "OW", table[:100].tobytes())
    with pytest.raises(CaseError, match="Modality LUT"):
        loaded(save_image(ds, tmp_path / "b.dcm"))


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian])
def test_byte_orders_and_implicit_types_give_equal_values(slice_of, save_image, tmp_path, syntax):
    ds = slice_of(DEEP)
    ds.file_meta.TransferSyntaxUID = syntax
    if syntax == ExplicitVRBigEndian:
        ds.PixelData = DEEP.astype(">i2").tobytes()
        ds["PixelData"].VR = "OW"
    assert np.array_equal(loaded(save_image(ds, tmp_path / "a.dcm")), DEEP.T)


def test_a_file_without_preamble_is_read(slice_of, save_image, tmp_path):
    ds = slice_of(DEEP)
    path = save_image(ds, tmp_path / "a.dcm")
    content = path.read_bytes()
    path.write_bytes(content[144 + int.from_bytes(content[140:144], "little") :])
    assert np.array_equal(loaded(path), DEEP.T)


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless])
def test_lossless_codings_give_equal_values(slice_of, save_image, tmp_path, syntax):
    raw = RNG.integers(0, 4096, (80, 70), dtype="uint16")
    ds = slice_of(raw)
    ds.BitsStored, ds.HighBit = 12, 11
    ds.compress(syntax)
    assert np.array_equal(loaded(save_image(ds, tmp_path / "a.dcm")), raw.T)


def test_a_missing_decoder_is_named_with_the_extra_to_install(slice_of, save_image, tmp_path, monkeypatch):
    ds = slice_of(RNG.integers(0, 4096, (80, 70), dtype="uint16"))
    ds.compress(JPEG2000Lossless)
    path = save_image(ds, tmp_path / "a.dcm")
    monkeypatch.setattr(JPEG2000LosslessDecoder, "_available", {})
    monkeypatch.setattr(pixels, "installed", lambda name: False)
    with pytest.raises(CaseError, match=r'JPEG 2000.*pip install "medseg\[dicom\]"'):
        load(path)


@pytest.mark.parametrize(
    "spoil", [lambda data: data[: len(data) // 2], lambda data: data[:60] + b"\0" * (len(data) - 60)]
)
def test_damaged_compressed_pixels_are_refused(slice_of, save_image, tmp_path, spoil):
    ds = slice_of(RNG.integers(0, 4096, (80, 70), dtype="uint16"))
    ds.compress(JPEG2000Lossless)
    path = save_image(ds, tmp_path / "a.dcm")
    content = path.read_bytes()
    start = content.index(b"\xff\x4f\xff\x51")
    path.write_bytes(content[:start] + spoil(content[start:]))
    with pytest.raises(CaseError, match=r"cannot be decoded|decodes to|truncated"):
        load(path)


def test_a_codestream_of_another_size_than_the_header_is_refused(slice_of, save_image, tmp_path):
    ds = slice_of(RNG.integers(0, 4096, (80, 70), dtype="uint16"))
    ds.compress(JPEG2000Lossless)
    ds.Rows = 50
    with pytest.raises(CaseError, match=r"cannot be decoded|decodes to"):
        load(save_image(ds, tmp_path / "a.dcm"))


class PanicException(BaseException):
    pass


@pytest.mark.parametrize(("raised", "expected"), [(PanicException, CaseError), (KeyboardInterrupt, KeyboardInterrupt)])
def test_a_decoder_that_panics_is_a_damaged_file_and_a_stop_of_the_user_is_not(
    slice_of, save_image, tmp_path, monkeypatch, raised, expected
):
    def fail(*arguments, **options):
        raise raised("index out of bounds")

    path = save_image(slice_of(DEEP), tmp_path / "a.dcm")
    monkeypatch.setattr(pixels.pydicom, "dcmread", fail)
    with pytest.raises(expected, match="index out of bounds"):
        load(path)
