"""Samples of a patch dataset for torch. Apart from `samples`, so that preparing loads no torch."""

from __future__ import annotations

from typing import Any

import torch
import torch.utils.data

from amlp_ray.data.samples import Samples


class TorchSamples(torch.utils.data.Dataset[dict[str, Any]]):
    """Samples as a map-style torch dataset; an unlabelled image has a mask of zeros and `labelled` False.

    A row group is read at a time, so a shuffle reads most images many times over: for training on a set that is not
    small, `load` it or use `open_batches`.
    """

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.samples[index]
        image, mask = torch.from_numpy(sample.image.copy()), sample.mask
        return {
            "id": sample.id,
            "image": image,
            "mask": torch.zeros(image.shape[1:], dtype=torch.uint8)
            if mask is None
            else torch.from_numpy(mask.copy()),
            "labeled": mask is not None,
        }
