"""Say what was guessed about the masks of a set, and ask where a guess could be wrong."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from amlp_ray.config import PrepareConfig
from amlp_ray.data.decoders.mask_rule import (
    BRIGHT,
    MAX_LABEL,
    WHITE,
    MaskRule,
    chosen_values,
    full_scale,
    has_many_values,
    is_gray_color,
    is_label_map,
    palette_colors,
    read_mask_as,
)
from amlp_ray.data.decoders.mask_values import DARK, MaskValues, PlaneValues
from amlp_ray.data.decoders.masks import list_values
from amlp_ray.errors import DataError
from amlp_ray.utils.text import counted

# Remains of JPEG have more different values in a set than classes have grays.
MAX_CLASS_GRAYS = 8
# Largest share of pixels between dark and bright for which half of the highest value is a border.
MAX_MIDDLE = 0.25


class _Mask(NamedTuple):
    """A mask, and its plane that is read."""

    mask: MaskValues
    values: PlaneValues


def describe_masks(masks: Sequence[MaskValues], rule: MaskRule, config: PrepareConfig) -> list[str]:
    """Return a sentence for each thing that was guessed.

    Raises:
        DataError: what the masks of the set mean cannot be guessed, or `config` does not fit them.
    """
    chosen = [_Mask(mask, chosen_values(mask, rule, config)) for mask in masks]
    notes = _describe_palettes(masks, rule, config)
    if config.lesion_labels:
        return notes + _check_labels(chosen, config.lesion_labels) + _describe_unlisted(chosen)
    _ask_palettes(masks, rule, config)
    if config.lesion_threshold is None:
        _ask_values(chosen, rule)
        notes += _describe_values(chosen, rule)
    else:
        _check_threshold(chosen, config.lesion_threshold)
    num_alpha = sum(read_mask_as(mask, rule, config).plane == "alpha" for mask in masks)
    if num_alpha:
        notes.append(
            f"{_count(num_alpha, masks)} {_have(num_alpha)} one color: what is not transparent is "
            "lesion."
        )
    return notes


def _ask_values(chosen: Sequence[_Mask], rule: MaskRule) -> None:
    """Raise DataError if masks hold values that may or may not be lesion."""
    scale = full_scale(values for mask, values in chosen if not mask.is_one_bit)
    many = [pair for pair in chosen if has_many_values(*pair)]
    lossless = [pair for pair in many if not pair.mask.lossy_kind]
    grays = _all_values(lossless)
    if grays and len(grays) <= MAX_CLASS_GRAYS:
        problem = "{have} few grays, which may be classes, or a lesion with soft edges"
        raise _question(lossless, chosen, problem, _describe_options(grays, scale))
    unclear = [pair for pair in many if _is_unclear(pair.values)]
    if unclear:
        options = _describe_options((), scale)
        problem = "{have} values between dark and bright: probabilities, soft edges or classes"
        raise _question(unclear, chosen, problem, options)
    grounds = [pair for pair in chosen if pair.values.highest > 0]
    without = [pair for pair in grounds if _lacks_background(pair)]
    if len(without) * 2 > len(grounds):
        is_colored = any(mask.is_colored for mask, _ in without)
        options = "export them as white on black"
        if not is_colored:
            options = _describe_options(_all_values(without), scale)
        raise _question(without, chosen, "{have} no background 0", options)
    weak = [pair for pair in grounds if _is_weak(pair, scale, rule)]
    if weak:
        reason = f"though others reach {scale:g}" if scale > MAX_LABEL else "which JPEG blurs"
        problem = f"{{have}} faint values, {reason}: noise or labels"
        raise _question(weak, chosen, problem, _describe_faint(weak, scale))


def _all_values(masks: Iterable[_Mask]) -> set[float]:
    """Return the values of masks; none if one of them has too many to be listed."""
    union: set[float] = set()
    for _, values in masks:
        if not values.values:
            return set()
        union.update(values.values)
    return union


def _is_unclear(values: PlaneValues) -> bool:
    """Return whether half of the highest value is no border between background and lesion."""
    has_dark = 0 <= values.lowest < DARK * values.highest
    return not has_dark or values.middle > MAX_MIDDLE


def _lacks_background(pair: _Mask) -> bool:
    """Return whether a mask has several values, or colors, but no zero."""
    mask, values = pair
    is_varied = values.num_values > 1 or (values is mask.colors and mask.num_colors > 1)
    return is_varied and values.lowest > 0 and not has_many_values(mask, values)


def _is_weak(pair: _Mask, scale: float, rule: MaskRule) -> bool:
    """Return whether the values of a mask are too small to be told from noise."""
    mask, values = pair
    if mask.lossy_kind and values.highest <= MAX_LABEL:
        return True
    if values is mask.indices or mask.is_one_bit or scale <= MAX_LABEL:
        return False
    if values.is_exact or is_label_map(mask, values):
        # Above zero counts here; where other masks have noise, this may be noise too.
        return values.highest <= MAX_LABEL and rule.threshold > 0
    return values.highest < BRIGHT * scale and (values.num_values > 1 or rule.threshold > 0)


def _question(
    masks: Sequence[_Mask], chosen: Sequence[_Mask], problem: str, options: str
) -> DataError:
    """Return the error that asks which values of some of the chosen masks are lesion."""
    example, values = masks[0]
    examples = list_values(values.values)
    if values.num_values > MAX_CLASS_GRAYS:
        examples = f"{values.num_values} values from {values.lowest:g} to {values.highest:g}"
    sentence = problem.format(have=_have(len(masks)))
    return DataError(
        f"{_count(len(masks), chosen)} {sentence}, such as {example.path} ({examples}). "
        f"Say what is lesion: {options}."
    )


def _describe_options(grays: Iterable[float], scale: float) -> str:
    """Say which options answer a question."""
    half = f"{scale // 2:g}" if scale > 1 else f"{scale / 2:g}"
    labels = [f"{gray:g}" for gray in sorted(grays) if gray >= 1 and gray == int(gray)]
    threshold = f"--lesion-threshold {half} takes all above {half}"
    if not labels:
        return f"{threshold}, and --lesion-threshold 0 all above 0"
    listed = ", ".join(labels)
    return f"--lesion-labels {labels[-1]} takes one value (there are {listed}), and {threshold}"


def _describe_faint(weak: Sequence[_Mask], scale: float) -> str:
    """Say which thresholds take or leave masks of small values."""
    lowest = min(values.highest for _, values in weak) // 2
    takes = f"--lesion-threshold {lowest:g} takes them"
    if scale <= MAX_LABEL:
        return f"{takes}; better export the masks as PNG, with 255 for lesion"
    return f"{takes}, and --lesion-threshold {scale // 2:g} leaves them without lesion"


def _describe_values(chosen: Sequence[_Mask], rule: MaskRule) -> list[str]:
    """Say which values count as lesion, if there are several."""
    notes = []
    many = sum(has_many_values(*pair) for pair in chosen)
    if many:
        notes.append(
            f"{_count(many, chosen)} {_have(many)} many values, as remains of JPEG or soft edges: "
            f"what lies above {rule.threshold:g}, half of the highest, is lesion; "
            "--lesion-threshold sets another value."
        )
    labels: set[float] = set()
    for mask, values in chosen:
        if not has_many_values(mask, values):
            labels.update({float(WHITE)} if mask.is_one_bit else values.values)
    labels.discard(0.0)
    if len(labels) > 1:
        notes.append(
            f"The masks hold the values {list_values(sorted(labels))}: all are lesion; "
            "--lesion-labels takes some of them."
        )
    num_colored = sum(mask.num_colors > 2 for mask, _ in chosen)
    if num_colored and not many:
        notes.append(
            f"{_count(num_colored, chosen)} {_have(num_colored)} several colors: all but black is "
            "lesion."
        )
    return notes


def _describe_palettes(
    masks: Sequence[MaskValues], rule: MaskRule, config: PrepareConfig
) -> list[str]:
    """Say how palettes are read. Raises DataError if labels mean something else in each."""
    palettes = [mask for mask in masks if mask.palette]
    if not palettes:
        return []
    colors = palette_colors(palettes)
    begin = f"The palettes of {_count(len(palettes), masks)}"
    if not config.lesion_labels:
        if colors is None and rule.palettes == "colors":
            return [f"{begin} differ, so their colors count: all but black is lesion."]
        return []
    if rule.palettes == "indices" and colors is None:
        raise DataError(
            f"{begin} differ: one index has different colors, such as in {palettes[0].path}, so "
            "lesion_labels cannot be their indices; export all masks with one palette or as gray."
        )
    if colors is not None and all(index == color & 0xFF for index, color in colors.items()):
        return []
    name = "indices" if rule.palettes == "indices" else "gray values"
    return [f"{begin} are read by their {name}, which lesion_labels name."]


def _ask_palettes(masks: Sequence[MaskValues], rule: MaskRule, config: PrepareConfig) -> None:
    """Raise DataError if the background of palettes is not plain."""
    palettes = [mask for mask in masks if mask.palette and mask.alpha_use != "only"]
    if not palettes:
        return
    colors = palette_colors(palettes)
    is_gray = all(is_gray_color(color) for mask in palettes for _, color in mask.palette)
    begin = f"The palettes of {_count(len(palettes), masks)}, such as {palettes[0].path},"
    indices = list_values(sorted({index for mask in palettes for index, _ in mask.palette}))
    by_index = f"--lesion-labels takes some of the indices {indices}"
    if not is_gray and config.lesion_threshold is not None:
        raise DataError(f"{begin} are in color, so no threshold can be applied; {by_index}.")
    num_without = sum(all(color for _, color in mask.palette) for mask in palettes)
    if rule.palettes == "colors" and not is_gray and num_without * 2 > len(palettes):
        advice = by_index if colors is not None else "export all masks as gray"
        raise DataError(f"{begin} have neither an index 0 nor black as background; {advice}.")
    if config.lesion_threshold is not None or not colors:
        return
    background = colors.get(0, 0)
    if background and 0 in colors.values():
        black = min(index for index, color in colors.items() if not color)
        advice = f"{by_index}, or export them as white on black"
        if is_gray:
            advice = (
                f"--lesion-labels {black} takes what is black, and --lesion-labels "
                f"{background & 0xFF} what is bright"
            )
        raise DataError(
            f"{begin} have a bright background or a bright lesion: 0 is bright and {black} is "
            f"black. Say what is lesion: {advice}."
        )


def _check_labels(chosen: Sequence[_Mask], lesion_labels: tuple[int, ...]) -> list[str]:
    """Say which of the labels no mask holds. Raises DataError if none holds any."""
    readable = [pair for pair in chosen if not pair.mask.lossy_kind and pair.values.highest > 0]
    held = _all_values(readable)
    if not held:
        return []
    if any(mask.is_one_bit for mask, _ in readable):
        held.add(float(WHITE))
    missing = [label for label in lesion_labels if label not in held]
    if not missing:
        return []
    listed = list_values(missing)
    if len(missing) == len(lesion_labels):
        raise DataError(
            f"None of {counted(len(chosen), 'mask')} holds lesion_labels {listed}; they hold "
            f"{list_values(sorted(held - {0.0}))}, such as {readable[0].mask.path}. Give "
            "--lesion-labels values that they hold, or leave it out to take all above 0."
        )
    return [
        f"No mask holds {listed} of lesion_labels; they hold {list_values(sorted(held - {0.0}))}."
    ]


def _describe_unlisted(chosen: Sequence[_Mask]) -> list[str]:
    """Say that labels take single values of masks that have many."""
    many = [
        pair
        for pair in chosen
        if has_many_values(*pair)
        and pair.values.num_values > MAX_CLASS_GRAYS
        and not pair.mask.lossy_kind
    ]
    if not many:
        return []
    return [
        f"{_count(len(many), chosen)} {_have(len(many))} many values, such as {many[0].mask.path}: "
        "only what is exactly one of lesion_labels is lesion; --lesion-threshold takes a range."
    ]


def _check_threshold(chosen: Sequence[_Mask], lesion_threshold: float) -> None:
    """Raise DataError if no mask reaches above the threshold, though some are not empty."""
    highest = [WHITE if mask.is_one_bit else values.highest for mask, values in chosen]
    if highest and 0 < max(highest) <= lesion_threshold:
        raise DataError(
            f"None of {len(chosen)} masks has a value above lesion_threshold {lesion_threshold:g}; "
            f"the highest is {max(highest):g}. Give a lower one."
        )


def _count(number: int, of: Sequence[object]) -> str:
    """Say how many masks of a set are meant."""
    return f"{number} of {counted(len(of), 'mask')}"


def _have(number: int) -> str:
    return "has" if number == 1 else "have"
