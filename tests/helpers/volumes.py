"""Write small NIfTI volumes, DICOM series and SEG objects as scanners and tools write them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from pydicom import Dataset
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

CT = "1.2.840.10008.5.1.4.1.1.2"
CAPTURE = "1.2.840.10008.5.1.4.1.1.7"


def write_nifti(
    path: Path, values: np.ndarray, affine: np.ndarray | None = None, **header: Any
) -> Path:
    """Write a volume; `header` sets fields such as scl_slope, whose values are stored as given."""
    image = nib.Nifti1Image(values, np.eye(4) if affine is None else affine)
    path.parent.mkdir(parents=True, exist_ok=True)
    slope, inter = header.pop("scl_slope", None), header.pop("scl_inter", None)
    if slope is not None:
        image.header.set_slope_inter(slope, inter or 0)
        # nibabel divides by the slope while it writes. Multiply first, so that `values` are stored.
        image = nib.Nifti1Image(values * slope + (inter or 0), image.affine, image.header)
        image.header.set_data_dtype(values.dtype)
        image.header.set_slope_inter(slope, inter or 0)
    nib.save(image, path)
    return path


def turned(values: np.ndarray, affine: np.ndarray, codes: str) -> tuple[np.ndarray, np.ndarray]:
    """Return a volume of RAS axes stored along other ones, such as "PSR", with its affine."""
    image = nib.Nifti1Image(values, affine)
    way = nib.orientations.ornt_transform(
        nib.orientations.io_orientation(affine), nib.orientations.axcodes2ornt(tuple(codes))
    )
    other = image.as_reoriented(way)
    return np.asarray(other.dataobj), other.affine


def dicom(pixels: np.ndarray, *, patient: str = "Mustermann^0815", **elements: Any) -> FileDataset:
    """Make a CT or secondary capture image in memory, with everything that names a patient.

    `elements` replace or add to it.

    `pixels` is (H, W), (H, W, 3) or (F, H, W), of 8, 16 or 32 bits.
    """
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    color = pixels.ndim == 3 and pixels.shape[-1] == 3
    frames = 1 if color or pixels.ndim == 2 else len(pixels)
    values: dict[str, Any] = {
        "SOPClassUID": CT,
        "SOPInstanceUID": generate_uid(),
        "SeriesInstanceUID": generate_uid(),
        "StudyInstanceUID": generate_uid(),
        "FrameOfReferenceUID": "1.2.3.4",
        "PatientID": patient,
        "PatientName": f"{patient}^Erika",
        "PatientBirthDate": "19700101",
        "PatientSex": "F",
        "StudyDate": "20240102",
        "StudyTime": "101112",
        "StudyID": "S1",
        "AccessionNumber": "ACC4711",
        "InstitutionName": "St. Elsewhere",
        "ReferringPhysicianName": "House^Gregory",
        "Manufacturer": "made",
        "Modality": "CT",
        "SeriesNumber": 1,
        "Rows": pixels.shape[0 if frames == 1 else 1],
        "Columns": pixels.shape[1 if frames == 1 else 2],
        "SamplesPerPixel": 3 if color else 1,
        "PhotometricInterpretation": "RGB" if color else "MONOCHROME2",
        "BitsAllocated": pixels.dtype.itemsize * 8,
        "BitsStored": pixels.dtype.itemsize * 8,
        "HighBit": pixels.dtype.itemsize * 8 - 1,
        "PixelRepresentation": int(pixels.dtype.kind == "i"),
        "PixelSpacing": [0.5, 0.75],
        "SliceThickness": 2.5,
    }
    if color:
        values["PlanarConfiguration"] = 0
    if frames > 1:
        values["NumberOfFrames"] = frames
    for name, value in (values | elements).items():
        if value is not None:
            setattr(dataset, name, value)
    dataset.add_new(0x7FE00010, "OW" if pixels.dtype.itemsize > 1 else "OB", pixels.tobytes())
    return dataset


def save(dataset: Dataset, path: Path) -> Path:
    """Write a dataset as a DICOM file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


def ct_series(
    folder: Path, volume: np.ndarray, *, names: Sequence[str] | None = None, **elements: Any
) -> list[FileDataset]:
    """Write slices (Z, H, W), 2.5 mm apart and from below upwards.

    The files are named so that sorting by name misleads.
    """
    shared = {"SeriesInstanceUID": generate_uid(), "StudyInstanceUID": generate_uid()} | elements
    slices = []
    for z, pixels in enumerate(volume):
        position = {
            "ImagePositionPatient": [-10.0, -20.0, 2.5 * z - 40],
            "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
            "InstanceNumber": len(volume) - z,
        }
        dataset = dicom(pixels, **(position | shared))
        save(dataset, folder / (names[z] if names else f"IM{(7 * z + 3) % len(volume):04d}"))
        slices.append(dataset)
    return slices


def segmentation(sources: Sequence[Dataset], masks: np.ndarray, **options: Any) -> Dataset:
    """Make a SEG object by highdicom, of masks (Z, H, W) or, with segments, (Z, H, W, S)."""
    import highdicom as hd
    from pydicom.sr.codedict import codes

    count = masks.shape[3] if masks.ndim == 4 else max(1, int(masks.max()))
    descriptions = [
        hd.seg.SegmentDescription(
            segment_number=number,
            segment_label=f"lesion {number}",
            segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure,
            segmented_property_type=codes.SCT.Neoplasm,
            algorithm_type=hd.seg.SegmentAlgorithmTypeValues.MANUAL,
        )
        for number in range(1, count + 1)
    ]
    arguments: dict[str, Any] = {
        "source_images": list(sources),
        "pixel_array": masks,
        "segmentation_type": "BINARY",
        "segment_descriptions": descriptions,
        "series_instance_uid": generate_uid(),
        "series_number": 9,
        "sop_instance_uid": generate_uid(),
        "instance_number": 1,
        "manufacturer": "made",
        "manufacturer_model_name": "made",
        "software_versions": "1",
        "device_serial_number": "1",
    }
    return hd.seg.Segmentation(**(arguments | options))
