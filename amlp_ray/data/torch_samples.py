"""Samples of a patch dataset as a torch dataset. A module of its own: preparing loads no torch."""

from __future__ import annotations

from typing import Any

import torch
import torch.utils.data

from amlp_ray.data.samples import Samples


class TorchSamples(torch.utils.data.Dataset[dict[str, Any]]):
    """Samples as a map-style torch dataset of dicts: `id`, `image`, `mask` and `labeled`.

    An unlabeled image has a mask of zeros, and `labeled` is False. A shuffle reads most images
    many times, since a row group is read at a time: to train on a large set, call
    `PatchDataset.load` or `open_batches`.
    """

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.samples[index]
        image = torch.from_numpy(sample.image.copy())
        if sample.mask is None:
            mask = torch.zeros(image.shape[1:], dtype=torch.uint8)
        else:
            mask = torch.from_numpy(sample.mask.copy())
        return {"id": sample.id, "image": image, "mask": mask, "labeled": sample.mask is not None}
