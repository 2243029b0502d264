"""DICOM series of any orientation, made by pydicom for the tests: classic single-frame files or one multi-frame file.

A series is made from a volume on a scanner-like grid: array axes (column, row, slice) with an affine in RAS+ mm whose
axes are orthogonal. ``scanner_affine`` makes such grids; pixel values are the volume's.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import EnhancedMRImageStorage, ExplicitVRLittleEndian, MRImageStorage, generate_uid
from scipy.spatial.transform import Rotation

LPS = np.diag([-1.0, -1.0, 1.0])
# Directions of a scanner's rows and columns (LPS): along increasing column index, along increasing row index.
PLANES = {
    "axial": ((1, 0, 0), (0, 1, 0)),
    "sagittal": ((0, 1, 0), (0, 0, -1)),
    "coronal": ((1, 0, 0), (0, 0, -1)),
}


def scanner_affine(plane="axial", spacing=(1.0, 1.25, 3.0), origin=(-20.0, 31.0, 12.5), turn=None) -> np.ndarray:
    """RAS+ affine of (column, row, slice) indices for a named plane; ``turn`` is a rotation put before it."""
    row, column = (np.array(d, float) for d in PLANES[plane])
    directions = np.column_stack([row, column, np.cross(row, column)])
    if turn is not None:
        directions = turn @ directions
    affine = np.eye(4)
    affine[:3, :3] = LPS @ directions * np.asarray(spacing)
    affine[:3, 3] = origin
    return affine


def volume(shape=(11, 9, 6), seed=0) -> np.ndarray:
    """Whole numbers in which no two voxels are equal."""
    numbers = np.random.default_rng(seed).permutation(int(np.prod(shape))) + 10
    return numbers.reshape(shape).astype(np.int16)


def header(series_uid: str, number: int, description: str, sop_class: str) -> Dataset:
    """What every image of a series says."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = sop_class
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = generate_uid()
    ds.SeriesInstanceUID, ds.StudyInstanceUID, ds.FrameOfReferenceUID = series_uid, "1.2.3", "1.2.3.4"
    ds.SeriesNumber, ds.SeriesDescription, ds.Modality, ds.Manufacturer = number, description, "MR", "fastsrgan"
    ds.PatientName, ds.PatientID, ds.PatientPosition = "Secret^Name", "secret-id", "HFS"
    ds.StudyDate, ds.StudyTime, ds.AcquisitionTime = "20200101", "120000", "120000"
    ds.ImageType = ["ORIGINAL", "PRIMARY", "M", "ND"]
    return ds


def set_pixels(ds: Dataset, pixels: np.ndarray) -> None:
    """Pixels (rows, columns) or (frames, rows, columns), 16-bit."""
    ds.Rows, ds.Columns = pixels.shape[-2:]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated = ds.BitsStored = 16
    ds.HighBit, ds.PixelRepresentation = 15, int(pixels.dtype.kind == "i")
    ds.PixelData = np.ascontiguousarray(pixels).astype(pixels.dtype.newbyteorder("<")).tobytes()


def place(affine: np.ndarray, k: int) -> tuple[list[float], list[float], list[float], float]:
    """Position, orientation, pixel spacing (rows, columns) and slice spacing of slice ``k``."""
    columns = LPS @ affine[:3, :3]
    spacing = np.sqrt((columns**2).sum(0))
    directions = columns / spacing
    position = LPS @ (affine @ [0, 0, k, 1])[:3]
    orientation = [*directions[:, 0], *directions[:, 1]]
    return position.tolist(), orientation, [spacing[1], spacing[0]], float(spacing[2])


def decimal(values) -> list[str]:
    """Numbers as scanners write them: decimal strings of at most 16 characters."""
    return [f"{v:.12g}"[:16] for v in np.atleast_1d(values)]


def write_series(
    folder: Path,
    data: np.ndarray,
    affine: np.ndarray,
    *,
    number: int = 1,
    description: str = "T2",
    uid: str | None = None,
    order=None,
    scale=None,
    prefix: str = "IM",
    first: int = 1,
    change=None,
) -> list[Path]:
    """One file per slice, as a scanner writes them.

    order : of acquisition, a permutation of the slices (instance numbers follow it); default ascending
    scale : slope and intercept per slice
    change : called with (dataset, slice number) before it is written; returning False leaves the file out
    """
    folder.mkdir(parents=True, exist_ok=True)
    uid = uid or generate_uid()
    paths = []
    for instance, k in enumerate(range(data.shape[2]) if order is None else order, start=first):
        ds = header(uid, number, description, MRImageStorage)
        position, orientation, pixel, thick = place(affine, k)
        ds.ImagePositionPatient, ds.ImageOrientationPatient = decimal(position), decimal(orientation)
        ds.PixelSpacing, ds.SliceThickness, ds.SpacingBetweenSlices = decimal(pixel), thick, thick
        ds.InstanceNumber, ds.AcquisitionNumber, ds.EchoTime, ds.RepetitionTime = instance, 1, 100, 4000
        if scale is not None:
            ds.RescaleSlope, ds.RescaleIntercept = scale[k]
        set_pixels(ds, data[:, :, k].T)
        if change is not None and change(ds, k) is False:
            continue
        paths.append(folder / f"{prefix}{instance:04d}.dcm")
        ds.save_as(paths[-1], enforce_file_format=True)
    return paths


def write_enhanced(path: Path, data: np.ndarray, affine: np.ndarray, *, order=None, number=1, change=None) -> Path:
    """One multi-frame file (Enhanced MR Image Storage) of a volume, or of several: (X, Y, Z[, T])."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = data[..., None] if data.ndim == 3 else data
    ds = header(generate_uid(), number, "enhanced", EnhancedMRImageStorage)
    frames = [(k, t) for t in range(data.shape[3]) for k in (range(data.shape[2]) if order is None else order)]
    _, orientation, pixel, thick = place(affine, 0)
    measures, plane, shared, value = Dataset(), Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness, measures.SpacingBetweenSlices = decimal(pixel), thick, thick
    plane.ImageOrientationPatient = decimal(orientation)
    value.RescaleSlope, value.RescaleIntercept, value.RescaleType = 2, 5, "US"
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [plane]
    shared.PixelValueTransformationSequence = [value]
    ds.SharedFunctionalGroupsSequence = [shared]
    ds.PerFrameFunctionalGroupsSequence = []
    for k, t in frames:
        group, content, position = Dataset(), Dataset(), Dataset()
        content.TemporalPositionIndex, content.StackID, content.InStackPositionNumber = t + 1, "1", k + 1
        content.DimensionIndexValues = [t + 1, k + 1]
        position.ImagePositionPatient = decimal(place(affine, k)[0])
        group.FrameContentSequence, group.PlanePositionSequence = [content], [position]
        ds.PerFrameFunctionalGroupsSequence.append(group)
    ds.NumberOfFrames, ds.InstanceNumber = len(frames), 1
    set_pixels(ds, np.stack([data[:, :, k, t].T for k, t in frames]))
    if change is not None:
        change(ds)
    ds.save_as(path, enforce_file_format=True)
    return path


def read(path: Path) -> Dataset:
    """A file back as a dataset."""
    return pydicom.dcmread(path)


# --- what dcm2niix makes of them ----------------------------------------------------------------------------------

GOLDEN = Path(__file__).parent / "golden" / "dicom" / "dcm2niix.json"
SLANT = Rotation.from_euler("xyz", (0.2, -0.1, 0.3)).as_matrix()


def cases() -> dict[str, tuple[np.ndarray, dict]]:
    """Name -> (affine, arguments of ``write_series``; of ``write_enhanced`` where the name ends in enhanced)."""
    found: dict[str, tuple[np.ndarray, dict]] = {}
    for plane in PLANES:
        found[f"{plane}"] = (scanner_affine(plane), {})
        found[f"{plane} descending"] = (scanner_affine(plane), {"order": [5, 4, 3, 2, 1, 0]})
        found[f"{plane} interleaved"] = (scanner_affine(plane), {"order": [1, 3, 5, 0, 2, 4], "first": 7})
        oblique = scanner_affine(plane, turn=SLANT)
        found[f"{plane} oblique"] = (oblique, {})
        found[f"{plane} oblique against the normal"] = (oblique @ np.diag([1.0, 1, -1, 1]), {})
    far = Rotation.from_euler("xyz", (0.9, -0.7, 2.3)).as_matrix()
    found["double oblique"] = (scanner_affine("axial", turn=far), {})
    found["sagittal oblique enhanced"] = (scanner_affine("sagittal", turn=SLANT), {"order": [5, 4, 3, 2, 1, 0]})
    return found


def write_case(folder: Path, name: str) -> Path:
    """The files of one case below ``folder``."""
    affine, settings = cases()[name]
    if name.endswith("enhanced"):
        return write_enhanced(folder / "multiframe.dcm", volume(), affine, **settings)
    write_series(folder, volume(), affine, **settings)
    return folder


def regenerate(program: str) -> None:
    """Record affine and intensities of every case as dcm2niix converts them."""
    recorded: dict[str, Any] = {}
    for name in cases():
        with tempfile.TemporaryDirectory() as place_:
            source, target = Path(place_, "in"), Path(place_, "out")
            target.mkdir()
            write_case(source, name)
            command = [program, "-b", "n", "-z", "n", "-f", "x", "-o", str(target), str(source)]
            told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            image = nib.load(next(target.glob("*.nii")))
            recorded["version"] = told.splitlines()[0]
            recorded[name] = {"affine": image.affine.tolist(), "data": np.asarray(image.dataobj).astype(int).tolist()}
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(recorded), encoding="utf8")


if __name__ == "__main__":  # python tests/dicom_files.py PATH_OF_DCM2NIIX
    regenerate(sys.argv[1])
