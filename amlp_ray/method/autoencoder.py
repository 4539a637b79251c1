"""The masked autoencoder: an encoder of the visible patches, and narrow decoders.

Shapes: B images, N patches, V visible, m masked (V + m = N), R prefix tokens, D encoder width,
E decoder width, P values per patch.

Source: MAE (He et al. 2022). Since positions are added to tokens, the decoder needs no unshuffling
and predicts masked patches only, which gives the same result. Ranking decoder: HPM (Wang et al.
2023). Encoding all tokens: SimMIM (Xie et al. 2022).
"""

from __future__ import annotations

from copy import deepcopy
from typing import NamedTuple

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from amlp_ray.config import ImageSpec, ModelConfig, PretrainConfig
from amlp_ray.method.encoder import (
    build_encoder,
    embed_patches,
    encoder_tokens,
    initialize,
    queries_keys_values,
    sincos_positions,
)
from amlp_ray.method.kmeans import DatasetClusters
from amlp_ray.method.patches import gather


class Prediction(NamedTuple):
    """Outputs for the masked patches.

    Attributes:
        pixels: (B, m, P).
        category: (B, m) logits of a lesion (CCL), or None.
        difficulty: (B, m) predicted difficulty (HPM), or None.
    """

    pixels: Tensor
    category: Tensor | None
    difficulty: Tensor | None


class Decoder(nn.Module):
    """A stack of transformer blocks and a norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(config.decoder_width, config.decoder_heads, mlp_ratio=4, qkv_bias=True)
            for _ in range(config.decoder_depth)
        )
        self.norm = nn.LayerNorm(config.decoder_width, eps=1e-6)  # as the blocks' own, and MAE's
        for module in self.blocks.modules():
            initialize(module)

    def forward(self, tokens: Tensor, last: int | None = None) -> Tensor:
        """Decode tokens (B, R + N, E); return all of them, or the `last` ones only."""
        for block in self.blocks[:-1]:
            tokens = block(tokens)
        last_block = self.blocks[-1]
        tokens = last_block(tokens) if last is None else _last_tokens(last_block, tokens, last)
        return self.norm(tokens)


def _last_tokens(block: Block, tokens: Tensor, last: int) -> Tensor:
    """Return the `last` tokens of `block(tokens)`, for less work than all of them."""
    attention = block.attn
    q, k, v = queries_keys_values(block, tokens)
    q = q[:, :, -last:]
    tokens = tokens[:, -last:]
    if attention.fused_attn:
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
    else:
        mixed = (q * attention.scale @ k.mT).softmax(-1) @ v
    tokens = tokens + attention.proj(mixed.transpose(1, 2).flatten(2))
    return tokens + block.mlp(block.norm2(tokens))


def _linear(width: int, out_width: int) -> nn.Linear:
    layer = nn.Linear(width, out_width)
    initialize(layer)
    return layer


class MaskedAutoencoder(nn.Module):
    """Encoder and decoder with optional parts: category head (CCL), ranking decoder (HPM), teacher.

    Optional parts are created last, so that with and without them all other weights start equal.
    `teacher`, a moving average of everything else, and `centroids`, those of the dataset, take no
    gradient and are saved with the model.
    """

    def __init__(
        self,
        config: ModelConfig,
        spec: ImageSpec,
        *,
        category: bool = False,
        ranking: bool = False,
    ) -> None:
        super().__init__()
        self.decoder_positions: Tensor
        self.config = config
        self.patch_size = config.patch_size
        self.spec = spec
        self.encoder: VisionTransformer = build_encoder(config, spec)
        self.grid: tuple[int, int] = self.encoder.patch_embed.grid_size
        self.prefix = self.encoder.num_prefix_tokens
        self.linear = config.decoder_depth == 0
        head_width = config.width if self.linear else config.decoder_width
        if not self.linear:
            self.decoder_embed = _linear(config.width, head_width)
            positions = sincos_positions(self.grid, head_width, self.prefix)
            self.register_buffer("decoder_positions", positions, persistent=False)
        # SimMIM masks patches before the encoder, MAE adds mask tokens after it.
        mask_width = config.width if config.encode == "all" else head_width
        self.mask_token = nn.Parameter(torch.zeros(1, 1, mask_width))
        self.decoder: Decoder | None = None if self.linear else Decoder(config)
        self.predict = _linear(head_width, spec.channels * config.patch_size**2)
        nn.init.normal_(self.mask_token, std=0.02)
        self.category = _linear(head_width, 1) if category else None
        self.ranking = Decoder(config) if ranking else None
        self.rank = _linear(head_width, 1) if ranking else None
        self.teacher: MaskedAutoencoder | None = None
        self.centroids: DatasetClusters | None = None

    def forward(self, patches: Tensor, visible: Tensor, masked: Tensor) -> Prediction:
        """Reconstruct the masked patches.

        Args:
            patches: (B, N, P).
            visible: (B, V) patch indices.
            masked: (B, m) patch indices.
        """
        if self.config.encode == "all":
            return self._encode_all(patches, masked)
        assert self.decoder is not None
        encoded = self.decoder_embed(encoder_tokens(self.encoder, patches, visible))
        prefix = encoded[:, : self.prefix]
        positions = self.decoder_positions[0, self.prefix :]  # (N, E); those of the prefix are 0
        shown = encoded[:, self.prefix :] + nn.functional.embedding(visible, positions)
        hidden = self.mask_token + nn.functional.embedding(masked, positions)
        tokens = torch.cat([prefix.to(shown.dtype), shown, hidden.to(shown.dtype)], 1)
        last = masked.shape[1]
        ranking = None if self.ranking is None else self.ranking(tokens, last)
        return self._heads(self.decoder(tokens, last), ranking)

    def _encode_all(self, patches: Tensor, masked: Tensor) -> Prediction:
        """Encode all patches with mask tokens in place of the masked ones (SimMIM)."""
        embedded = embed_patches(self.encoder, patches)
        hidden = self.mask_token.to(embedded.dtype).expand(len(patches), masked.shape[1], -1)
        embedded = embedded.scatter(1, masked[..., None].expand_as(hidden), hidden)
        tokens = encoder_tokens(self.encoder, patches, hidden=embedded)
        if not self.linear:
            tokens = self.decoder_embed(tokens) + self.decoder_positions
        decoded = tokens if self.decoder is None else self.decoder(tokens)
        return self._heads(gather(decoded, masked + self.prefix))

    def _heads(self, decoded: Tensor, ranking: Tensor | None = None) -> Prediction:
        """Predict from decoded tokens (B, m, E) of both decoders."""
        category = None if self.category is None else self.category(decoded)[..., 0]
        difficulty = None if self.rank is None else self.rank(ranking)[..., 0]
        return Prediction(self.predict(decoded), category, difficulty)

    def predicted_difficulty(self, patches: Tensor) -> Tensor:
        """Return the ranking decoder's difficulty of all patches of whole images, (B, N).

        Source: the teacher of HPM (Wang et al. 2023).
        """
        assert self.rank is not None
        assert self.ranking is not None
        tokens = self.decoder_embed(encoder_tokens(self.encoder, patches)) + self.decoder_positions
        return self.rank(self.ranking(tokens)[:, self.prefix :])[..., 0]


def build_autoencoder(config: PretrainConfig, spec: ImageSpec) -> MaskedAutoencoder:
    """Build the model of a run, with the parts that its losses and its selection use."""
    model = MaskedAutoencoder(
        config.model,
        spec,
        category=config.loss.ccl_weight > 0,
        ranking=config.loss.ranking_weight > 0,
    )
    if config.needs_teacher:
        model.teacher = deepcopy(model).requires_grad_(False)
    selection = config.selection
    if selection.uses_clusters and selection.scope == "dataset":
        dimensions = {
            "stats": 3 * spec.channels,
            "context": 4,
            "raw": spec.channels * config.model.patch_size**2,
            "tokens": config.model.width,
        }
        model.centroids = DatasetClusters(selection.clusters, dimensions[selection.features])
    return model
