"""Read all masks of a set by one rule, and look at what came of it.

Pass 1 reads each mask as it alone suggests. Only then are the values of all masks known. Items
whose masks are read otherwise under the rule of the set are scanned again.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from amlp_ray.config import PrepareConfig
from amlp_ray.data.decoders.mask_questions import describe_masks
from amlp_ray.data.decoders.mask_rule import MaskRule, choose_rule, read_mask_as
from amlp_ray.data.prepare.ray_tasks import run_jobs
from amlp_ray.data.prepare.scan import SCANS, ScannedItem, item_to_row, scan_job
from amlp_ray.errors import DataError

logger = logging.getLogger(__name__)

RESCAN_PICTURES = 64  # of a job
# A mask that covers more of its image, and most of the image's border, may be inverted.
INVERTED_SHARE = 0.5
INVERTED_BORDER = 0.9
# Share of the masks from which on a finding is no accident.
MANY = 0.5


def read_masks_alike(
    scanned: Sequence[ScannedItem], config: PrepareConfig
) -> tuple[list[ScannedItem], MaskRule]:
    """Choose one rule for the masks of all pictures, and scan again what it changes.

    Raises:
        DataError: the rule cannot be guessed, so `config` has to say more.
    """
    masks = [mask for _, scan in scanned for mask in scan.mask_values]
    rule = choose_rule(masks, config)
    for sentence in describe_masks(masks, rule, config):
        logger.info("%s", sentence)
    changed = [number for number, pair in enumerate(scanned) if _is_changed(pair, rule, config)]
    jobs: dict[int, dict[str, Any]] = {}
    for start in range(0, len(changed), RESCAN_PICTURES):
        rows = [
            item_to_row(scanned[number].item) for number in changed[start : start + RESCAN_PICTURES]
        ]
        jobs[start] = {"config": config.model_dump(mode="json"), "mask_rule": rule, "items": rows}
    alike = list(scanned)
    for start, results in run_jobs(jobs, scan_job):
        scans = SCANS.validate_python(results)
        for number, scan in zip(changed[start : start + RESCAN_PICTURES], scans, strict=True):
            alike[number] = ScannedItem(scanned[number].item, scan)
    return alike, rule


def check_lesions(scanned: Sequence[ScannedItem], config: PrepareConfig) -> list[str]:
    """Return a sentence for each sign that the masks of a set were misread, with counts.

    Args:
        scanned: all items, also those with faults.
        config: what the masks were said to hold.

    Raises:
        DataError: most masks cannot be used, or mark the whole image.
    """
    labeled = [pair for pair in scanned if pair.item.is_labeled]
    if not labeled:
        return []
    lost = [pair for pair in labeled if pair.scan.fault]
    if len(lost) > MANY * len(labeled):
        raise DataError(
            f"{len(lost)} of {len(labeled)} images with masks cannot be used. The first: "
            f"{lost[0].scan.fault}"
        )
    readable = [pair for pair in labeled if not pair.scan.fault]
    marked = [pair for pair in readable if pair.scan.mask_area.lesion_share > 0]
    full = [pair for pair in marked if pair.scan.mask_area.lesion_share == 1]
    inverted = [pair for pair in marked if _looks_inverted(pair)]
    if len(full) > MANY * len(marked):
        raise DataError(
            f"{len(full)} of {len(marked)} masks mark the whole image as lesion, such as "
            f"{_name(full[0])}; look at their values, and give --lesion-labels or "
            "--lesion-threshold, or export them again."
        )
    sentences = []
    if lost:
        sentences.append(f"{len(lost)} of {len(labeled)} images with masks cannot be used.")
    if full:
        sentences.append(
            f"{len(full)} of {len(marked)} masks mark the whole image as lesion, such as "
            f"{_name(full[0])}."
        )
    if len(inverted) > MANY * len(marked):
        sentences.append(
            f"{len(inverted)} of {len(marked)} masks mark most of the image and its border as "
            f"lesion, such as {_name(inverted[0])}: invert them if background is bright in them."
        )
    num_empty = len(readable) - len(marked)
    if num_empty > MANY * len(readable):
        advice = "; look whether lesion_labels or lesion_threshold fit" * _is_chosen(config)
        sentences.append(f"{num_empty} of {len(readable)} masks hold no lesion{advice}.")
    return sentences


def _is_changed(pair: ScannedItem, rule: MaskRule, config: PrepareConfig) -> bool:
    """Return whether the rule of the set reads the masks of an item otherwise than pass 1 did."""
    masks = pair.scan.mask_values
    own_rule = choose_rule(masks, config)
    return any(
        read_mask_as(mask, rule, config) != read_mask_as(mask, own_rule, config) for mask in masks
    )


def _looks_inverted(pair: ScannedItem) -> bool:
    area = pair.scan.mask_area
    return area.lesion_share > INVERTED_SHARE and area.border_share > INVERTED_BORDER


def _is_chosen(config: PrepareConfig) -> bool:
    """Return whether the user said which values are lesion."""
    return bool(config.lesion_labels) or config.lesion_threshold is not None


def _name(pair: ScannedItem) -> str:
    """Name the mask of an item, or its image if the masks are in one file."""
    return pair.item.masks[0] if pair.item.masks else pair.item.images[0]
