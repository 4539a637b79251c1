"""Read one folder per image, with any number of masks in a folder inside, as DSB2018 has them.

    <id>/images/<id>.png   <id>/masks/<any name>.png ...          <id>/<id>.png   <id>/masks/...

Masks may have any names, since their folder tells their image; they are united. A folder without
masks holds an unlabeled image. An id is the path of the folder.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from amlp_ray.config import PrepareConfig
from amlp_ray.data.layouts.item import Listing, RejectedFile, rejected
from amlp_ray.data.layouts.listing import FileName, list_pictures, picture_item
from amlp_ray.data.layouts.mask_folders import IMAGE_FOLDERS, MASK_FOLDERS
from amlp_ray.data.path import DataPath


@dataclass
class ImageFolder:
    """What a folder holds for its image."""

    images: list[FileName] = field(default_factory=list)
    masks: list[FileName] = field(default_factory=list)


def find_folders(root: DataPath, config: PrepareConfig) -> Listing:
    """List the image of each folder with its masks.

    A folder with several images or none is rejected, since nothing tells what its masks mark.
    """
    items = []
    rejects: list[RejectedFile] = []
    strays: list[RejectedFile] = []
    for path, folder in group_by_folder(list_pictures(root)).items():
        if len(folder.images) == 1:
            items.append(picture_item(root, folder.images[0], folder.masks, id=path))
            continue
        count = len(folder.images)
        if count > 1:
            reason = f"lies in {path} with other images; keep one image in a folder"
            rejects += [rejected(image.full, reason) for image in folder.images]
        reason = f"is a mask in {path}, which holds {count or 'no'} images; one is needed"
        strays += [rejected(mask.full, reason) for mask in folder.masks]
    return Listing(items, rejects + strays, stray_masks=tuple(strays))


def group_by_folder(pictures: list[FileName]) -> dict[str, ImageFolder]:
    """Sort pictures by the folder of their image, and into images and masks.

    A picture alone in a folder beside those with masks is an image without masks. Other pictures
    outside such folders belong to none.
    """
    folders: dict[str, ImageFolder] = defaultdict(ImageFolder)
    beside: dict[str, list[FileName]] = defaultdict(list)  # pictures by the folder they lie in
    for picture in pictures:
        parent, _, name = picture.folder.rpartition("/")
        if parent and MASK_FOLDERS.fullmatch(name.lower()):
            folders[parent].masks.append(picture)
        elif parent and IMAGE_FOLDERS.fullmatch(name.lower()):
            folders[parent].images.append(picture)
        else:
            beside[picture.folder].append(picture)
    parents = {path.rpartition("/")[0] for path in folders}
    for path, images in beside.items():
        is_unlabeled = bool(path) and path.rpartition("/")[0] in parents and len(images) == 1
        if (path in folders or is_unlabeled) and not folders[path].images:
            folders[path].images = images
    return folders


def has_a_folder_per_image(pictures: list[FileName]) -> bool:
    """Return whether most masks lie in a folder of one image, under names that are not its own."""
    folders = group_by_folder(pictures)
    own = [folder for folder in folders.values() if len(folder.images) == 1 and folder.masks]
    is_single = len(own) == 1 and len(own[0].masks) > 1
    if not is_single and len(own) < 2:
        return False
    num_masks = sum(len(folder.masks) for folder in folders.values())
    return 2 * sum(len(folder.masks) for folder in own) > num_masks
