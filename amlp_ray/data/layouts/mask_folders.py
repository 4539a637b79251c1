"""Tell folders of images from folders of masks, and choose among several of masks.

Retina sets hold fields of view and readings of several observers beside the images:

    images/21_training.tif   mask/21_training_mask.gif   1st_manual/21_manual1.gif   2nd_manual/...

Where names do not say which folder marks lesions, the user is asked: `mask_folder`.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from functools import lru_cache
from typing import Literal, NamedTuple

from amlp_ray.data.layouts.listing import FileName, normalize
from amlp_ray.data.path import DataPath
from amlp_ray.errors import DataError
from amlp_ray.utils.text import counted

# Names of folders in lower case.
IMAGE_FOLDERS = re.compile(r"(image|img)s?")
MANUAL_FOLDERS = re.compile(r"((1st|2nd|first|second)_)?manual_?\d?")
MASK_FOLDERS = re.compile(
    rf"(mask|label|annotation|segmentation)s?|ground_?truth|gt|{MANUAL_FOLDERS.pattern}"
)
# Names that may mean masks, too; only where others are known can they be told from images.
PERHAPS_MASKS = re.compile(
    r"mask|manual|label|segm|annotat|truth|lesion|vessel|fov|(?<![a-z])(gt|seg|roi)s?(?![a-z])"
)
FIELD_OF_VIEW = re.compile(r"fov|field[_ -]?of[_ -]?view")
PLAIN_MASKS = re.compile(r"masks?")
SECOND_READING = re.compile(r"(2nd|second)_manual|manual_?2")
MASK_ENDINGS = ("_mask", "_segmentation", "_seg", "_labels", "_label", "_gt")
FLAGS = re.IGNORECASE | re.DOTALL  # names may hold newlines
MASK_NAME = re.compile(rf"(?P<id>.+)({'|'.join(MASK_ENDINGS)})(_\d+)?", FLAGS)
FIRST_WORD = re.compile(r"[^_\-. ]+")

Kind = Literal["image", "mask", "unused", ""]


class MaskFolder(NamedTuple):
    """The folder whose masks mark lesions; no name means all folders of masks."""

    name: str  # in lower case
    remark: str  # why it was chosen


def home_of(folder: str, mask_folder: str = "") -> tuple[Kind, str]:
    """Return whether a folder is named for images, masks or neither, and its path without that.

    If `mask_folder` is given, it alone is for masks, and other such names are unused.

    >>> home_of("train/images"), home_of("train/masks/a"), home_of("masks", "1st_manual")
    (('image', 'train'), ('mask', 'train/a'), ('unused', ''))
    """
    return _home_of(folder, mask_folder)


@lru_cache(maxsize=1024)
def _home_of(folder: str, mask_folder: str) -> tuple[Kind, str]:
    parts = folder.split("/")
    for i, part in enumerate(parts):
        rest = "/".join(parts[:i] + parts[i + 1 :])
        name = part.lower()
        if mask_folder and name == mask_folder:
            return "mask", rest
        if IMAGE_FOLDERS.fullmatch(name):
            return "image", rest
        if MASK_FOLDERS.fullmatch(name):
            return "unused" if mask_folder else "mask", rest
    return "", folder


class MaskMatcher:
    """Find the image that a mask in another folder is named after."""

    def __init__(self, image_names: Iterable[str], masks: Iterable[str] | None = None) -> None:
        """Index images by name.

        Args:
            image_names: paths without the folder of images and without suffix.
            masks: names of all masks, to match by the first word where that is unique among images
                and among masks; None: match by whole names only.
        """
        self._names = {normalize(name): name for name in image_names}
        self._by_word: dict[tuple[str, str], str] = {}
        if masks is None:
            return
        words = Counter(_first_word(name) for name in self._names)
        mask_words = Counter(map(_first_word, map(normalize, masks)))
        for name in self._names:
            word = _first_word(name)
            if words[word] == 1 and mask_words[word] == 1:
                self._by_word[word] = name

    def match(self, mask_name: str) -> str | None:
        """Return the normalized name of the image of a mask, None if there is none."""
        name = normalize(mask_name)
        folder, slash, stem = name.rpartition("/")
        ending = MASK_NAME.fullmatch(stem)
        candidates = [name, f"{folder}{slash}{ending['id']}" if ending else name]
        for candidate in candidates:
            if candidate in self._names:
                return candidate
        return self._by_word.get(_first_word(name))


def _first_word(name: str) -> tuple[str, str]:
    """Return the folder of a name and the first word of the last part.

    >>> _first_word("training/21_manual1")
    ('training', '21')
    """
    folder, _, stem = name.rpartition("/")
    word = FIRST_WORD.match(stem)
    return folder, word[0] if word else stem


def choose_mask_folder(root: DataPath, pictures: list[FileName], mask_folder: str) -> MaskFolder:
    """Choose the folder whose masks mark lesions, where several hold masks of the same images.

    Args:
        root: the listed folder, for messages.
        pictures: all pictures.
        mask_folder: the name that the user gave; empty if none.

    Raises:
        DataError: there is no folder of that name, or names do not tell which to take.
    """
    if mask_folder:
        _check_holds_pictures(root, pictures, mask_folder.lower())
        return MaskFolder(mask_folder.lower(), "")
    rivals = _find_rivals(pictures)
    if not rivals:
        return MaskFolder("", "")
    manual = [name for name in rivals if MANUAL_FOLDERS.fullmatch(name)]
    other_uses = {}
    for name in rivals:
        is_beside_manual = bool(manual) and PLAIN_MASKS.fullmatch(name)
        if FIELD_OF_VIEW.search(name) or is_beside_manual:
            other_uses[name] = "fields of view"
        elif len(manual) > 1 and SECOND_READING.fullmatch(name):
            other_uses[name] = "a second reading"
    left = [name for name in rivals if name not in other_uses]
    if len(left) == 1:
        others = " and ".join(f"{name} ({use})" for name, use in other_uses.items())
        remark = f"masks are those of {left[0]}, not of {others}; mask_folder chooses another"
        return MaskFolder(left[0], remark)
    listed = ", ".join(f"{name} ({counted(count, 'file')})" for name, count in rivals.items())
    raise DataError(
        f"{root} holds several folders of masks for the same images: {listed}. Say which of them "
        f"marks lesions, such as --mask-folder {(left or list(rivals))[0]}, or give the folder of "
        "images alone."
    )


def _check_holds_pictures(root: DataPath, pictures: list[FileName], folder: str) -> None:
    names = {part.lower() for picture in pictures for part in picture.folder.split("/") if part}
    if folder not in names:
        listed = ", ".join(sorted(names)[:20]) or "none"
        raise DataError(
            f"{root} has no folder of pictures named {folder!r}; its folders are {listed}, so give "
            "mask_folder one of these names."
        )


def find_unnamed_masks(pictures: list[FileName]) -> str:
    """Return a folder whose pictures are named like images, and whose name may mean masks.

    Only where other pictures lie in a folder named for images; empty if there is none.
    """
    if not any(home_of(picture.folder)[0] == "image" for picture in pictures):
        return ""
    folders = _match_folders(pictures)
    return next((name for name, folder in folders.items() if folder.images), "")


class _Candidate(NamedTuple):
    """A folder that may hold masks."""

    num_files: int
    images: set[str]  # names of the images that these are named after


def _find_rivals(pictures: list[FileName]) -> dict[str, int]:
    """Return the names of folders that hold masks of the same images, each with its files."""
    folders = _match_folders(pictures)
    rivals = {}
    for name, folder in folders.items():
        others = [other.images for other_name, other in folders.items() if other_name != name]
        if any(folder.images & images for images in others):
            rivals[name] = folder.num_files
    return rivals


def _match_folders(pictures: list[FileName]) -> dict[str, _Candidate]:
    """Return the folders that may hold masks, by name."""
    images = []
    loose = []  # pictures in folders of other names
    masks_by_folder: dict[str, list[str]] = defaultdict(list)  # names without that folder
    for picture in pictures:
        kind, rest = home_of(picture.folder)
        parent, _, last = picture.folder.rpartition("/")
        if kind == "mask":
            name = picture._replace(folder=rest).without_suffix
            masks_by_folder[_mask_part(picture.folder)].append(name)
        elif kind == "image":
            images.append(picture._replace(folder=rest).without_suffix)
        elif PERHAPS_MASKS.search(last.lower()):
            name = picture._replace(folder=parent).without_suffix
            masks_by_folder[last.lower()].append(name)
        else:
            loose.append(picture.without_suffix)
    candidates = {}
    for folder, names in masks_by_folder.items():
        matcher = MaskMatcher(images or loose, names)
        matched = {image for name in names if (image := matcher.match(name)) is not None}
        candidates[folder] = _Candidate(len(names), matched)
    return candidates


def _mask_part(folder: str) -> str:
    """Return the part of a path that is named for masks, in lower case."""
    return next(part for part in folder.lower().split("/") if MASK_FOLDERS.fullmatch(part))
