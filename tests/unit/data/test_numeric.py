"""Files of floating-point, signed and 32-bit values are read exactly, whatever holds them."""

import io
import logging
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.unit.data.helpers import encode, npy, open_source, pixels_of, refusal, write_files

RANDOM = np.random.default_rng(1)
CT = RANDOM.integers(-1024, 3072, (3, 6, 5)).astype(np.int16)
LATENTS = RANDOM.normal(size=(3, 16, 6, 5)).astype(np.float32)


def npz(**arrays: np.ndarray) -> bytes:
    np.savez(content := io.BytesIO(), **arrays)
    return content.getvalue()


def tiff(pixels: np.ndarray, order: str = "<") -> bytes:
    """Return an uncompressed gray TIFF of any type of numbers, which Pillow cannot write."""
    height, width = pixels.shape
    data = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    sample_format = {"u": 1, "i": 2, "f": 3}[pixels.dtype.kind]
    tags = {256: width, 257: height, 258: 8 * pixels.itemsize, 259: 1, 262: 1, 273: 8, 277: 1, 278: height}
    tags |= {279: len(data), 339: sample_format}
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags.items())
    directory = struct.pack(f"{order}H", len(tags)) + entries + bytes(4)
    mark = b"II*\0" if order == "<" else b"MM\0*"
    return mark + struct.pack(f"{order}I", 8 + len(data)) + data + directory


FILES = {
    "tiff int16": (tiff, ".tif", CT),
    "tiff big-endian": (lambda pixels: tiff(pixels, ">"), ".tif", CT),
    "tiff int32": (tiff, ".tif", CT.astype(np.int32) * 100_000),
    "tiff uint32": (tiff, ".tif", CT.clip(0).astype(np.uint32) * 2**20),
    "tiff float32": (tiff, ".tiff", CT / np.float32(7)),
    "npy float64": (npy, ".npy", CT / 8),
    "npy bytes": (npy, ".npy", CT.astype(np.int8)),
    "npz": (lambda pixels: npz(slice=pixels, label=np.array(1)), ".npz", CT),
    "pfm": (lambda pixels: b"Pf\n5 6\n-1.0\n" + pixels[::-1].tobytes(), ".pfm", CT / np.float32(7)),
}


@pytest.mark.parametrize("kind", FILES)
def test_files_of_numbers_are_read_exactly(tmp_path: Path, kind: str) -> None:
    write, suffix, images = FILES[kind]
    files = {f"{number}{suffix}": write(image) for number, image in enumerate(images)}
    found = open_source(write_files(tmp_path / "x", files), tmp_path / "cache", value_range="auto")
    assert np.array_equal(pixels_of(found)[..., 0].astype(np.float64), images)
    assert found.value_range == (images.min(), images.max())


@pytest.mark.parametrize("images", [LATENTS, LATENTS[:, None], LATENTS.transpose(0, 2, 3, 1)])
def test_latents_come_with_any_number_of_channels_on_either_end(tmp_path: Path, images: np.ndarray) -> None:
    """Also in a batch of one."""
    folder = write_files(tmp_path / "x", {f"{number}.npy": npy(image) for number, image in enumerate(images)})
    found = open_source(folder, tmp_path / "cache", value_range="auto", num_channels=16)
    assert np.array_equal(found.take(found.positions)[0], LATENTS)
    assert "must be 1, 3 or 4 channels, or data.num_channels of them" in refusal(
        folder, tmp_path / "cache", value_range="auto"
    )


def test_images_whose_axes_are_all_equal_are_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cubes = RANDOM.normal(size=(2, 8, 8, 8)).astype(np.float32)
    np.save(tmp_path / "x.npy", cubes)
    folder = write_files(tmp_path / "x", {f"{number}.npy": npy(cube) for number, cube in enumerate(cubes)})
    for source in (tmp_path / "x.npy", folder):
        caplog.clear()
        found = open_source(source, tmp_path / "cache", value_range="auto", num_channels=8)
        assert np.array_equal(pixels_of(found), cubes)
        assert "each axis may be that of the channels; the last one is used" in caplog.text


def test_values_keep_their_scale_beside_pictures(tmp_path: Path) -> None:
    """Without a range, 8-bit images are scaled to the 16 bits of others."""
    deep = RANDOM.integers(0, 4096, (6, 5)).astype(np.uint16)
    folder = write_files(tmp_path / "x", {"0.png": encode(deep), "1.png": encode((deep // 16).astype(np.uint8))})
    found = open_source(folder, tmp_path / "cache", value_range=[0, 4095])
    assert found.images.dtype == np.uint16
    assert np.array_equal(pixels_of(found)[..., 0], [deep, deep // 16])
    assert np.array_equal(pixels_of(open_source(folder, tmp_path / "cache"))[1, ..., 0], deep // 16 * 257)


def test_an_image_with_nan_is_unreadable(tmp_path: Path) -> None:
    """It does not change the range that is found."""
    images = CT.astype(np.float32)
    images[1, 0, 0] = np.nan
    np.save(tmp_path / "x.npy", images)
    folder = write_files(tmp_path / "x", {f"{number}.npy": npy(image) for number, image in enumerate(images)})
    for source in (tmp_path / "x.npy", folder):
        assert "has values that are not finite (NaN or infinite)" in refusal(
            source, tmp_path / "cache", value_range="auto"
        )
        skipped = {"on_bad_image": "skip", "max_bad_fraction": 0.5}
        found = open_source(source, tmp_path / "cache", value_range="auto", **skipped)
        assert [found.num_bad, found.value_range] == [1, (CT[[0, 2]].min(), CT[[0, 2]].max())]


def test_an_array_has_at_most_as_many_values_as_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit against decompression bombs is that of Pillow."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 28)
    folder = write_files(tmp_path / "x", {"0.npy": npy(np.zeros((6, 5, 4), np.float32))})
    assert "has more than 28 pixels, Pillow's limit" in refusal(folder, tmp_path / "cache", value_range="auto")


# ------------------------------------------------------------------------------------------ formats of other libraries


@pytest.mark.parametrize(
    ("library", "content", "sentence"),
    [
        ("pydicom", bytes(128) + b"DICM", 'is a DICOM file; run pip install "ddpm_hf[dicom]" to read it.'),
        ("tifffile", tiff(CT[0] / 3), 'or other numbers of channels than 1, 3 and 4; run pip install "ddpm_hf[tiff]"'),
    ],
)
def test_a_missing_library_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str, content: bytes, sentence: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    folder = write_files(tmp_path / "x", {"0.dcm" if library == "pydicom" else "0.tif": content})
    assert sentence in refusal(folder, tmp_path / "cache", value_range="auto")


@pytest.mark.parametrize("planes", ["contig", "separate", "pages"])
def test_tiff_with_many_bands(tmp_path: Path, caplog: pytest.LogCaptureFixture, planes: str) -> None:
    tifffile = pytest.importorskip("tifffile")

    def write(image: np.ndarray) -> bytes:
        options = {} if planes == "pages" else {"planarconfig": planes}
        image = np.ascontiguousarray(image.transpose(1, 2, 0)) if planes == "contig" else image
        tifffile.imwrite(content := io.BytesIO(), image, photometric="minisblack", **options)
        return content.getvalue()

    folder = write_files(tmp_path / "x", {f"{number}.tif": write(image) for number, image in enumerate(LATENTS)})
    with caplog.at_level(logging.WARNING):
        found = open_source(folder, tmp_path / "cache", value_range="auto", num_channels=16)
    assert np.array_equal(found.take(found.positions)[0], LATENTS)
    assert caplog.text == ""


def dicom(pixels: np.ndarray, **elements: object) -> bytes:
    pydicom = pytest.importorskip("pydicom")
    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    dataset = pydicom.dataset.FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.BitsAllocated, dataset.SamplesPerPixel = 16, 1
    dataset.PixelRepresentation, dataset.PhotometricInterpretation = int(pixels.dtype.kind == "i"), "MONOCHROME2"
    dataset.PixelData = pixels.tobytes()
    for name, value in elements.items():
        setattr(dataset, name, value)
    dataset.HighBit = dataset.BitsStored - 1
    dataset.save_as(content := io.BytesIO(), enforce_file_format=True)
    return content.getvalue()


STORED = (CT + 1024).astype(np.uint16)


@pytest.mark.parametrize(
    ("elements", "expected", "dtype"),
    [
        ({"BitsStored": 12, "RescaleSlope": 1, "RescaleIntercept": -1024}, CT, "int16"),
        ({"BitsStored": 16, "RescaleSlope": 0.25, "RescaleIntercept": -3}, STORED / 4 - 3, "float32"),
        ({"BitsStored": 12, "PhotometricInterpretation": "MONOCHROME1"}, 4095 - STORED.astype(int), "uint16"),
    ],
)
def test_dicom_is_rescaled(tmp_path: Path, elements: dict[str, object], expected: np.ndarray, dtype: str) -> None:
    """Hounsfield units in CT. The lowest value of MONOCHROME1 is white."""
    files = {f"{number}.dcm": dicom(pixels, **elements) for number, pixels in enumerate(STORED)}
    found = open_source(write_files(tmp_path / "x", files), tmp_path / "cache", value_range="auto")
    assert found.images.dtype == dtype
    assert np.array_equal(pixels_of(found)[..., 0], expected)


@pytest.mark.parametrize("start", [132, 144])
def test_dicom_is_read_without_its_preamble(tmp_path: Path, start: int) -> None:
    """As old devices and exports write it: without the first 128 bytes, or without the whole header."""
    files = {}
    for number, pixels in enumerate(STORED):
        content = dicom(pixels, BitsStored=12, SOPClassUID="1.2.840.10008.5.1.4.1.1.2")
        header = int.from_bytes(content[140:144], "little") if start == 144 else 0
        files[f"IM{number}"] = content[start + header :]
    found = open_source(write_files(tmp_path / "x", files), tmp_path / "cache", value_range="auto")
    assert np.array_equal(pixels_of(found)[..., 0], STORED)


@pytest.mark.parametrize("name", ["x", "x.zip"])
def test_dicom_files_are_found_without_a_suffix(tmp_path: Path, name: str) -> None:
    """Not the list of them, nor files of other types."""
    pytest.importorskip("pydicom")
    files = {f"a/IM{number}": dicom(pixels, BitsStored=12) for number, pixels in enumerate(STORED)}
    files |= {"DICOMDIR": bytes(128) + b"DICM", "README": b"text"}
    write_files(tmp_path / "x", files)
    if name == "x.zip":
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for member, content in files.items():
                archive.writestr(member, content)
    found = open_source(tmp_path / name, tmp_path / "cache", value_range="auto")
    assert np.array_equal(pixels_of(found)[..., 0], STORED)
