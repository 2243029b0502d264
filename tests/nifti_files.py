"""NIfTI files of any kind, made byte by byte for the tests of the reader; nibabel is the oracle of what they mean."""

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy.spatial.transform import Rotation

OBLIQUE = np.array([[0.9, -0.2, 0.1, -30.0], [0.25, 1.1, -0.3, 12.5], [-0.1, 0.35, 2.9, 7.0], [0, 0, 0, 1]])
HEAD = np.random.default_rng(7).integers(0, 900, (7, 6, 5)).astype(np.int16)


def header_of(
    shape, dtype, affine=OBLIQUE, *, version=1, order="<", slope=1.0, inter=0.0, pair=False, units=2, **fields
):
    """A header as bytes; ``fields`` are set last, raw (a pair (index, value) sets one element)."""
    header = (nib.Nifti1Header if version == 1 else nib.Nifti2Header)(endianness=order)
    header.set_data_dtype(np.dtype(dtype))
    header["dim"][: len(shape) + 1] = [len(shape), *shape]
    header["dim"][len(shape) + 1 :] = 1
    header["pixdim"][1:4] = np.sqrt((affine[:3, :3] ** 2).sum(0))
    header.set_sform(affine, 1)
    header["scl_slope"], header["scl_inter"], header["xyzt_units"] = slope, inter, units
    header["vox_offset"] = 0 if pair else int(header["sizeof_hdr"]) + 4
    header["magic"] = {(1, False): b"n+1", (1, True): b"ni1"}.get((version, pair), b"ni2" if pair else b"n+2")
    for name, value in fields.items():
        if isinstance(value, tuple):
            header[name][value[0]] = value[1]
        else:
            header[name] = value
    return header.binaryblock


def rigid(spacing=(1.0, 1.2, 3.0), turn=(0.3, -0.2, 0.5), origin=(-30.0, 12.5, 7.0)):
    """An affine without shear."""
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", turn).as_matrix() * np.array(spacing)
    affine[:3, 3] = origin
    return affine


def qform_fields(affine, code=1):
    """Raw header fields that place a grid by its qform alone."""
    header = nib.Nifti1Header()
    header.set_qform(affine, code)
    names = ("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z")
    return {**{n: float(header[n]) for n in names}, "qform_code": code, "pixdim": ((slice(0, 4)), header["pixdim"][:4])}


def file_bytes(data=HEAD, affine=None, *, order="<", **options):
    """Header and voxels of a single-file image, not packed."""
    data = np.asarray(data)
    block = header_of(data.shape, data.dtype, rigid() if affine is None else affine, order=order, **options)
    return block + b"\0\0\0\0" + data.astype(data.dtype.newbyteorder(order)).tobytes(order="F")


def write(path, data=HEAD, affine=None, **options) -> Path:
    """Write an image; .gz and .hdr/.img by the name."""
    path = Path(path)
    if path.suffix in (".hdr", ".img"):
        raw = file_bytes(data, affine, pair=True, **options)
        cut = 348 if options.get("version", 1) == 1 else 540
        path.with_suffix(".hdr").write_bytes(raw[:cut])
        path.with_suffix(".img").write_bytes(raw[cut + 4 :])
        return path
    raw = file_bytes(data, affine, **options)
    path.write_bytes(gzip.compress(raw, 1) if path.suffix == ".gz" else raw)
    return path


def oracle(path):
    """(data float64, affine) as nibabel reads them."""
    image = nib.load(path)
    return np.asarray(image.get_fdata()), image.affine
