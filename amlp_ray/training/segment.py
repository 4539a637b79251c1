"""`finetune`: train a segmenter on labelled images, and score it. For confirmation, not for search: 20x a probe's cost.

Encoder (pretrained or from scratch), a convolutional decoder on the tokens of four depths, Dice and cross-entropy loss.
Scored on val by the threshold 0.5; on test where a confirmation asks for it by name, and nowhere else.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from amlp_ray.config import ImageSpec, ModelSettings, ProbeSettings, SegmentSettings
from amlp_ray.data.dataset import PatchDataset, Split
from amlp_ray.errors import CheckpointError, DataError, NonFiniteLossError, SettingsError
from amlp_ray.files import write_whole
from amlp_ray.method.augment import augment, normalise
from amlp_ray.method.encoder import new_encoder
from amlp_ray.settings import build, read_yaml, write_yaml
from amlp_ray.training.checkpoint import load_encoder, read_encoder_header, write_tensors
from amlp_ray.training.labelled import Rows, by_part, check_fits, lesion_pixels
from amlp_ray.training.pretrain import learning_rate
from amlp_ray.training.scores import by_size, mean_mask, score_images

SIZES = ProbeSettings().sizes
WEIGHTS = "segmenter.safetensors"


class Segmenter(nn.Module):
    """A ViT encoder with a convolutional decoder that fuses tokens of four depths and upsamples to pixels."""

    def __init__(self, encoder: VisionTransformer, spec: ImageSpec, patch_size: int, width: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.depths = sorted({round((i + 1) * len(encoder.blocks) / 4) - 1 for i in range(4)} - {-1})
        self.project = nn.ModuleList(nn.Conv2d(encoder.embed_dim, width, 1) for _ in self.depths)
        self.image = nn.Sequential(nn.Conv2d(spec.channels, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.GELU())
        self.fuse = _block(width, width)
        stages, side = [], patch_size
        while side > 2:  # to half resolution; the last step is bilinear, onto the image's own features
            stages.append(nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), _block(width, width)))
            side //= 2
        self.up = nn.Sequential(*stages)
        self.head = nn.Sequential(_block(width + 16, 32), nn.Conv2d(32, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Return lesion logits (B, 1, H, W) of normalised images (B, C, H, W)."""
        levels = self.encoder.forward_intermediates(images, indices=self.depths, norm=True, intermediates_only=True)
        fused = torch.stack([project(level) for project, level in zip(self.project, levels, strict=True)]).sum(0)
        coarse = self.up(self.fuse(fused))
        full = F.interpolate(coarse, images.shape[-2:], mode="bilinear", align_corners=False)
        return self.head(torch.cat([full, self.image(images)], 1))


def _block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(math.gcd(8, outputs), outputs), nn.GELU()
    )


def segment(
    dataset: PatchDataset,
    encoder: Path,
    out: Path,
    settings: SegmentSettings,
    *,
    from_scratch: bool = False,
    sizes: tuple[float, float] = SIZES,
    progress: Callable[[dict[str, Any]], None] = lambda metrics: None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Fine-tune on labelled training images with a lesion and score on val.

    Args:
        dataset: images with masks; need not be what the encoder was pretrained on, but must be of its shape and scale.
            `amlp-ray data check A --against B` tells whether val images are among those of the pretraining set.
        encoder: an exported encoder; `from_scratch` keeps its shape but not its weights: the baseline.
        sizes: what counts as a small and as a large lesion, see `probe.sizes`.

    Returns:
        Scores, also written to `out/score.json` next to `segmenter.safetensors` and `settings.yaml`.

    Raises:
        DataError: too few labelled images. SettingsError: the encoder was made for other images.
    """
    if (out / "checkpoint").exists():
        raise SettingsError(f"{out} holds a pretraining run; give another --out for the segmenter.")
    model_settings, spec = read_encoder_header(encoder)
    check_fits(dataset, spec, f"{encoder} was trained on")
    train, val = dataset.load("train", _train_rows(dataset, settings)), _labelled_rows(dataset, "val")
    out.mkdir(parents=True, exist_ok=True)  # told now, not after the training, where it cannot be made
    torch.manual_seed(settings.seed)
    # From scratch means the start that pretraining has, not timm's: anything else would handicap the baseline.
    vit = new_encoder(model_settings, spec) if from_scratch else load_encoder(encoder)
    model = Segmenter(vit, spec, model_settings.patch_size, settings.decoder_width).to(device)
    seconds = _fit(model, train, spec, settings, progress, device)
    # The encoder's own mean and SD, of whatever it was pretrained on, see `check_fits`.
    score = _score(model, dataset, "val", val, train.masks, spec, sizes, device) | {
        "labels": len(train),
        "from_scratch": from_scratch,
        "encoder": str(encoder),
        "seconds": seconds,
    }
    write_tensors(out / WEIGHTS, model.state_dict())
    write_yaml(settings, out / "settings.yaml")
    write_whole(out / "score.json", json.dumps(score, indent=1))
    return score


def score_segmenter(
    dataset: PatchDataset,
    encoder: Path,
    folder: Path,
    split: Literal["val", "test"],
    *,
    sizes: tuple[float, float] = SIZES,
    device: str = "cpu",
) -> dict[str, Any]:
    """Score a segmenter that `segment` left in `folder`, on the labelled images of a split; nothing is trained.

    Args:
        encoder: what it was fine-tuned from, for its shape and the images it was made for.

    Raises:
        DataError: the split has no lesion. CheckpointError: the segmenter is missing, damaged or of another encoder.
    """
    model_settings, spec = read_encoder_header(encoder)
    check_fits(dataset, spec, f"{encoder} was trained on")
    settings = build(SegmentSettings, read_yaml(folder / "settings.yaml"), str(folder / "settings.yaml"))
    rows = _labelled_rows(dataset, split)
    model = _load(folder / WEIGHTS, model_settings, spec, settings).to(device)
    trained = dataset.load("train", _train_rows(dataset, settings)).masks
    return _score(model, dataset, split, rows, trained, spec, sizes, device)


def _load(path: Path, model: ModelSettings, spec: ImageSpec, settings: SegmentSettings) -> Segmenter:
    segmenter = Segmenter(new_encoder(model, spec), spec, model.patch_size, settings.decoder_width)
    try:
        segmenter.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} cannot be read as a segmenter of its encoder ({type(error).__name__}); run `segment` again."
        ) from None
    return segmenter


def _train_rows(dataset: PatchDataset, settings: SegmentSettings) -> Rows:
    """Training images with a lesion, as many as `labels` says, chosen by seed."""
    rows = np.flatnonzero(lesion_pixels(dataset, "train") > 0)
    _require(dataset, "train", len(rows), settings.labels or 1)
    if settings.labels:
        rows = np.sort(np.random.default_rng(settings.seed).permutation(rows)[: settings.labels])
    return rows


def _labelled_rows(dataset: PatchDataset, split: str) -> Rows:
    """Labelled images of a split; read when they are scored, a file at a time."""
    pixels = lesion_pixels(dataset, split)
    _require(dataset, split, int((pixels > 0).sum()), 1)
    return np.flatnonzero(np.isfinite(pixels))


def _require(dataset: PatchDataset, split: str, found: int, wanted: int) -> None:
    if found < wanted:
        raise DataError(
            f"{dataset.path} has {found} labelled {split} images with a lesion, but {wanted} are needed; "
            f"add masks or lower labels."
        )


def _fit(
    model: Segmenter,
    train: Split,
    spec: ImageSpec,
    settings: SegmentSettings,
    progress: Callable[[dict[str, Any]], None],
    device: str,
) -> float:
    from monai.losses import DiceCELoss  # takes seconds to import; pretraining and the probe do without

    loss_of = DiceCELoss(sigmoid=True, batch=True)
    model.encoder.requires_grad_(not settings.freeze)
    model.encoder.pos_embed.requires_grad_(False)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=settings.lr, weight_decay=settings.weight_decay
    )
    rng = np.random.default_rng(settings.seed)
    images, masks, keys = (torch.from_numpy(x) for x in (train.images, train.masks, train.keys))
    per_epoch = max(1, len(train) // settings.batch_size)
    started = time.perf_counter()
    model.train()
    for epoch in range(1, settings.epochs + 1):
        order = rng.permutation(len(train))
        losses = []
        for b in range(per_epoch):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(settings, (epoch - 1) * per_epoch + b, settings.epochs * per_epoch)
            rows = order[b * settings.batch_size : (b + 1) * settings.batch_size]
            x, y = augment(
                normalise(images[rows].to(device), spec),
                masks[rows].to(device),
                keys[rows].to(device),
                crop_min=settings.crop_min,
                flip=settings.flip,
                flip_vertical=settings.flip_vertical,
                intensity=settings.intensity,
                seed=settings.seed,
                epoch=epoch,
            )
            loss = loss_of(model(x), y[:, None].float())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.detach())
        mean = torch.stack(losses).mean().item()
        if not np.isfinite(mean):
            raise NonFiniteLossError(f"The fine-tuning loss is not finite at epoch {epoch}; lower lr.")
        progress({"epoch": epoch, "loss": mean})
    return time.perf_counter() - started


@torch.inference_mode()
def _score(
    model: Segmenter,
    dataset: PatchDataset,
    split: str,
    rows: Rows,
    trained: np.ndarray,
    spec: ImageSpec,
    sizes: tuple[float, float],
    device: str,
) -> dict[str, Any]:
    """Score images of a split by row; `trained` are the training masks, whose mean is the floor."""
    model.eval()
    floor = mean_mask(trained)
    scores, floors, shares, ids = [], [], [], []
    for some in by_part(dataset, split, rows):
        part = dataset.load(split, some)
        chunks = torch.from_numpy(part.images).split(32)
        logits = torch.cat([model(normalise(chunk.to(device), spec)).cpu() for chunk in chunks])
        s = score_images((logits[:, 0] > 0).numpy(), part.masks > 0)
        scores.append(np.stack([s.dsc, s.ppv, s.sensitivity, s.empty_correct]))
        floors.append(score_images(np.broadcast_to(floor, part.masks.shape), part.masks > 0).dsc)
        shares.append(part.masks.mean((1, 2)))
        ids += part.ids
    dsc, ppv, sensitivity, empty = np.concatenate(scores, 1)
    lesion = np.isfinite(dsc)
    return {
        "dsc": float(np.nanmean(dsc)),
        "ppv": float(np.nanmean(ppv)),
        "sensitivity": float(np.nanmean(sensitivity)),
        "empty_correct": None if lesion.all() else float(np.nanmean(empty)),
        "images": int(lesion.sum()),
        **by_size(dsc, np.concatenate(shares), sizes),
        "per_image": {ids[i]: round(float(dsc[i]), 6) for i in np.flatnonzero(lesion)},
        "mean_mask_dsc": float(np.nanmean(np.concatenate(floors))),
    }
