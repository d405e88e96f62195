"""Files of one image whose values are not those of a picture: .npy, .npz, DICOM, and TIFF that Pillow does not read.

`open_numbers` returns type and shape of the values, and a function that reads them. A file that cannot be read raises
an error of NumPy, pydicom or tifffile, or a ValueError with the reason.
"""

import io
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin, UnidentifiedImageError

File: TypeAlias = Path | io.BytesIO

_TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_BIG_TIFF = (b"+\0", b"\0+")
_MAX_SAMPLES_OF_PILLOW = 6
_TIFF_SAMPLE_FORMAT, _TIFF_SAMPLES_PER_PIXEL, _SIGNED = 339, 277, 2
_LENGTH_OF_START = 132  # "DICM" follows 128 bytes
_MAX_UNPACKED_SIZE = 2**30
_COLOR_OF_DICOM = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")


class MissingLibraryError(ImportError):
    """A file that a library reads which is not installed. The message follows the name of the file."""


@dataclass(frozen=True)
class Numbers:
    """The values of an image.

    Args:
        kind: Format of the file.
        dtype: Type of the values.
        shape: (height, width), or with one more axis, the last or the first one, for channels.
        read: Return the values, in this type and shape.
        is_channels_last: Whether a third axis is that of the channels in any case.
        num_frames: More than 1 for a file of several, of which the first one is used.
    """

    kind: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    read: Callable[[], NDArray[Any]]
    is_channels_last: bool = False
    num_frames: int = 1


def open_numbers(file: File, num_channels: int | None) -> Numbers | None:
    """Open a file; return None if Pillow reads it, or says why not.

    Args:
        file: The path or the content.
        num_channels: data.num_channels: a TIFF may have further bands, or its pages may be the channels.

    Raises:
        MissingLibraryError: A library is not installed.
    """
    start = _start_of(file)
    if start.startswith(b"\x93NUMPY"):
        return _numbers_of_array(
            "npy", np.load(file, mmap_mode="r" if isinstance(file, Path) else None, allow_pickle=False)
        )
    if start.startswith(b"PK\x03\x04"):
        return _open_npz(file)
    if is_dicom(file):
        return _open_dicom(file)
    if start.startswith(_TIFF_STARTS) and not _is_read_by_pillow(file, num_channels):
        return _open_tiff(file, num_channels)
    return None


def is_dicom(file: File) -> bool:
    """Return whether a file is a DICOM file, as its content says, also without the 128 bytes before the data."""
    start = _start_of(file)
    return start[128:] == b"DICM" or _is_element_of_dicom(start)


def _is_element_of_dicom(start: bytes) -> bool:
    """Return whether bytes are a data element of the first groups, 2 and 8: its tag, and its type or length."""
    group, element, length = start[:2], start[2:4], int.from_bytes(start[4:8], "little")
    has_type = start[4:6] in (b"UI", b"UL", b"OB", b"CS", b"SH")
    return (
        group in (b"\x02\0", b"\x08\0") and element[1:] == b"\0" and (has_type or (0 < length <= 64 and not length % 2))
    )


def _start_of(file: File) -> bytes:
    if isinstance(file, io.BytesIO):
        return file.getvalue()[:_LENGTH_OF_START]
    with file.open("rb") as opened:
        return opened.read(_LENGTH_OF_START)


# ------------------------------------------------------------------------------------------------------------- arrays


def _numbers_of_array(kind: str, array: NDArray[Any]) -> Numbers:
    if array.ndim == 4 and array.shape[0] == 1:  # a batch of one, as autoencoders return latents
        array = array[0]
    return Numbers(kind, array.dtype, array.shape, lambda: np.asarray(array))


def _open_npz(file: File) -> Numbers:
    """Open the only array of an .npz file that may be an image, or the one named image or arr_0."""
    with np.load(file, allow_pickle=False) as archive:
        if sum(member.file_size for member in archive.zip.infolist()) > _MAX_UNPACKED_SIZE:
            raise ValueError(f"it would unpack to more than {_MAX_UNPACKED_SIZE:,} bytes")
        arrays = dict(archive)
    images = {name: array for name, array in arrays.items() if array.ndim >= 2 and array.dtype.kind in "buif"}
    name = next((name for name in ("image", "arr_0") if name in images), None) if len(images) > 1 else None
    if len(images) != 1 and name is None:
        raise ValueError(f"it has {len(images)} arrays with two or more axes among {', '.join(arrays)}; save one")
    return _numbers_of_array("npz", images[name or next(iter(images))])


# ----------------------------------------------------------------------------------------------------------------- TIFF


def _is_read_by_pillow(file: File, num_channels: int | None) -> bool:
    """Return whether Pillow reads all bands of a TIFF image and their sign."""
    try:
        if _num_samples(file) > _MAX_SAMPLES_OF_PILLOW:
            return False
        with Image.open(file, formats=("TIFF",)) as opened:
            tags, num_bands = opened.tag_v2, len(opened.getbands())
            is_signed_byte = opened.mode == "L" and tags.get(_TIFF_SAMPLE_FORMAT) == (_SIGNED,)
            found = (tags.get(_TIFF_SAMPLES_PER_PIXEL, 1), getattr(opened, "n_frames", 1))
            has_more = num_channels is not None and num_channels > num_bands and num_channels in found
            return not (is_signed_byte or has_more)
    except UnidentifiedImageError:
        return False
    except Exception:  # Pillow raises many types for damaged files, and does so again with a reason
        return True


def _num_samples(file: File) -> int:
    """Return the number of bands of a TIFF image, of which Pillow would log that they are too many."""
    with file.open("rb") if isinstance(file, Path) else io.BytesIO(file.getvalue()) as opened:
        start = opened.read(8)
        directory = TiffImagePlugin.ImageFileDirectory_v2(start + opened.read(8) if start[2:4] in _BIG_TIFF else start)
        opened.seek(directory.next)
        directory.load(opened)
        return int(directory.get(_TIFF_SAMPLES_PER_PIXEL, 1))


def _open_tiff(file: File, num_channels: int | None) -> Numbers:
    try:
        import tifffile
    except ImportError:
        raise ValueError(
            "Pillow does not read it, as it does not TIFF with floating-point color, signed bytes, or other numbers of "
            'channels than 1, 3 and 4; run pip install "ddpm_hf[tiff]" for these'
        ) from None

    content = file if isinstance(file, Path) else io.BytesIO(file.getvalue())
    with tifffile.TiffFile(content) as opened:
        pages = opened.pages
        first, num_pages = pages[0], len(pages)
        are_channels = len(first.shape) == 2 and num_pages > 1 and num_pages == num_channels
        axes, shape, dtype = str(first.axes), tuple(first.shape), np.dtype(first.dtype)
    if axes not in ("YX", "YXS", "SYX"):
        raise ValueError(f"it has the axes {axes}; an image has YX, YXS or SYX")
    if axes == "SYX":
        shape = (*shape[1:], shape[0])

    def read() -> NDArray[Any]:
        content = file if isinstance(file, Path) else io.BytesIO(file.getvalue())
        with tifffile.TiffFile(content) as opened:
            if are_channels:
                return np.stack([page.asarray() for page in opened.pages], axis=-1)
            pixels: NDArray[Any] = opened.pages[0].asarray()
            return np.moveaxis(pixels, 0, -1) if axes == "SYX" else pixels

    if are_channels:
        return Numbers("TIFF", dtype, (*shape, num_pages), read, is_channels_last=True)
    return Numbers("TIFF", dtype, shape, read, is_channels_last=True, num_frames=num_pages)


# ---------------------------------------------------------------------------------------------------------------- DICOM


def _open_dicom(file: File) -> Numbers:
    """Open a DICOM file: the values after the rescale slope and intercept, which are Hounsfield units in CT."""
    try:
        import pydicom
    except ImportError:
        raise MissingLibraryError('is a DICOM file; run pip install "ddpm_hf[dicom]" to read it.') from None
    if (log := logging.getLogger("pydicom")).level == logging.NOTSET:
        log.setLevel(logging.CRITICAL)  # it logs the errors that it raises, with their traces

    is_whole = _start_of(file)[128:] == b"DICM"
    dataset = pydicom.dcmread(file, stop_before_pixels=True, force=not is_whole)
    if "Rows" not in dataset or "PhotometricInterpretation" not in dataset:
        raise ValueError("it contains no image")
    height, width, num_samples = int(dataset.Rows), int(dataset.Columns), int(dataset.get("SamplesPerPixel", 1))
    photometry = str(dataset.PhotometricInterpretation)
    is_color = photometry in _COLOR_OF_DICOM or photometry == "PALETTE COLOR"
    if not is_color and (photometry not in ("MONOCHROME1", "MONOCHROME2") or num_samples != 1):
        raise ValueError(f"its photometric interpretation is {photometry}")
    low, high = _stored_range(dataset)
    slope, intercept = float(dataset.get("RescaleSlope") or 1), float(dataset.get("RescaleIntercept") or 0)
    if photometry == "PALETTE COLOR":
        dtype = np.dtype(np.uint8 if int(dataset.RedPaletteColorLookupTableDescriptor[2]) == 8 else np.uint16)
    elif "ModalityLUTSequence" in dataset:
        dtype = np.dtype(np.uint8 if int(dataset.ModalityLUTSequence[0].LUTDescriptor[2]) == 8 else np.uint16)
    else:
        dtype = _smallest_dtype(slope, intercept, low, high)

    def read() -> NDArray[Any]:
        from pydicom.pixels import apply_color_lut, apply_modality_lut, pixel_array

        whole = pydicom.dcmread(file if isinstance(file, Path) else io.BytesIO(file.getvalue()), force=not is_whole)
        if "TransferSyntaxUID" not in whole.file_meta:  # data without a header are not compressed
            is_implicit = whole.original_encoding[0]
            uid = pydicom.uid.ImplicitVRLittleEndian if is_implicit else pydicom.uid.ExplicitVRLittleEndian
            whole.file_meta.TransferSyntaxUID = uid
        pixels: NDArray[Any] = pixel_array(whole, index=0)
        if photometry == "PALETTE COLOR":
            pixels = apply_color_lut(pixels, whole)
        if is_color:
            return pixels.astype(dtype)
        if photometry == "MONOCHROME1":  # the lowest value is white
            pixels = low + high - pixels.astype(np.float64)
        if "ModalityLUTSequence" in whole:
            pixels = apply_modality_lut(pixels.astype(np.int64), whole)
        else:
            pixels = pixels.astype(np.float64) * slope + intercept
        return pixels.astype(dtype)

    shape = (height, width, 3) if is_color else (height, width)
    return Numbers(
        "DICOM", dtype, shape, read, is_channels_last=True, num_frames=int(dataset.get("NumberOfFrames") or 1)
    )


def _stored_range(dataset: Any) -> tuple[float, float]:
    """Return the smallest and the largest value that the pixels of a DICOM file can have, before they are rescaled."""
    if "BitsStored" not in dataset:  # floating point
        return -math.inf, math.inf
    bits = int(dataset.BitsStored)
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if dataset.get("PixelRepresentation") else (0, 2**bits - 1)


def _smallest_dtype(slope: float, intercept: float, low: float, high: float) -> np.dtype[Any]:
    """Return the smallest type that holds slope * x + intercept for all whole numbers from low to high."""
    ends = sorted((slope * low + intercept, slope * high + intercept))
    if slope.is_integer() and intercept.is_integer():
        for dtype in (np.uint8, np.uint16, np.int16, np.int32):
            if np.iinfo(dtype).min <= ends[0] and ends[1] <= np.iinfo(dtype).max:
                return np.dtype(dtype)
    return np.dtype(np.float64)
