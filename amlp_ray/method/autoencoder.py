"""The masked autoencoder: an encoder of the visible patches, and narrow decoders for the masked ones.

Shapes: B images, N patches, V visible, m masked (V + m = N), R prefix tokens, D encoder width, E decoder width,
P values per patch.
Source: MAE (He et al. 2022). Since positions are added to tokens, the decoder needs no unshuffling and predicts masked
patches only, which gives the same result. Ranking decoder: HPM (Wang et al. 2023). Encoding all tokens: SimMIM (Xie et
al. 2022).
"""

from __future__ import annotations

from copy import deepcopy
from typing import NamedTuple

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from amlp_ray.config import ImageSpec, ModelConfig, PretrainConfig
from amlp_ray.method.encoder import (
    embed_patches,
    encoder_tokens,
    initialize,
    new_encoder,
    sincos_positions,
)
from amlp_ray.method.kmeans import DatasetClusters
from amlp_ray.method.patches import gather


class Prediction(NamedTuple):
    """What is said of the patches asked for: `pixels` (B, m, P); `category` logits and `difficulty` (B, m) or None."""

    pixels: Tensor
    category: Tensor | None
    difficulty: Tensor | None


class Decoder(nn.Module):
    """A stack of blocks on decoder tokens (B, R + N, E): normalised tokens out, all of them or the `last` ones."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        wide = config.decoder_width
        self.blocks = nn.ModuleList(
            Block(wide, config.decoder_heads, mlp_ratio=4, qkv_bias=True)
            for _ in range(config.decoder_depth)
        )
        self.norm = nn.LayerNorm(wide, eps=1e-6)  # as the blocks' own, and MAE's
        for module in self.blocks.modules():
            initialize(module)

    def forward(self, tokens: Tensor, last: int | None = None) -> Tensor:
        if last is None:
            for block in self.blocks:
                tokens = block(tokens)
            return self.norm(tokens)
        for block in self.blocks[:-1]:
            tokens = block(tokens)
        return self.norm(_last_tokens(self.blocks[-1], tokens, last))


def _last_tokens(block: Block, tokens: Tensor, last: int) -> Tensor:
    """What a plain `block` makes of the `last` tokens, all tokens being looked at: equal to its own, for less work."""
    attention, (b, n, _) = block.attn, tokens.shape
    qkv = attention.qkv(block.norm1(tokens)).reshape(b, n, 3, attention.num_heads, -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, R + N, E / heads) each
    q, tokens = q[:, :, -last:], tokens[:, -last:]
    if attention.fused_attn:
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
    else:
        mixed = (q * attention.scale @ k.mT).softmax(-1) @ v
    tokens = tokens + attention.proj(mixed.transpose(1, 2).flatten(2))
    return tokens + block.mlp(block.norm2(tokens))


class MaskedAutoencoder(nn.Module):
    """Encoder and decoder; where asked for, a category head (CCL), a ranking decoder (HPM), and the teacher.

    Optional parts are created last, so that with and without them all other weights start equal. `teacher`, a moving
    average of everything else, and `centroids`, those of the data set, take no gradient and are saved with the model.
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
        self.encoder: VisionTransformer
        self.decoder_positions: Tensor
        self.config = config
        self.patch_size = config.patch_size
        self.spec = spec
        self.grid = (spec.height // config.patch_size, spec.width // config.patch_size)
        values = spec.channels * config.patch_size**2
        self.encoder = new_encoder(config, spec)
        self.prefix = self.encoder.num_prefix_tokens
        self.linear = config.decoder_depth == 0
        wide = config.width if self.linear else config.decoder_width
        if not self.linear:
            self.decoder_embed = nn.Linear(config.width, wide)
            positions = sincos_positions(self.grid, wide, self.prefix)
            self.register_buffer("decoder_positions", positions, persistent=False)
            initialize(self.decoder_embed)
        # SimMIM hides patches before the encoder, MAE adds them after it.
        self.mask_token = nn.Parameter(
            torch.zeros(1, 1, config.width if config.encode == "all" else wide)
        )
        self.decoder: Decoder | None = None if self.linear else Decoder(config)
        self.predict = nn.Linear(wide, values)
        initialize(self.predict)
        nn.init.normal_(self.mask_token, std=0.02)
        self.category = nn.Linear(wide, 1) if category else None
        if self.category is not None:
            initialize(self.category)
        self.ranking = Decoder(config) if ranking else None
        self.rank = nn.Linear(wide, 1) if ranking else None
        if self.rank is not None:
            initialize(self.rank)
        self.teacher: MaskedAutoencoder | None = None
        self.centroids: DatasetClusters | None = None

    def forward(self, patches: Tensor, visible: Tensor, masked: Tensor) -> Prediction:
        """Reconstruct the masked patches.

        Args:
            patches: (B, N, P). visible: (B, V), masked: (B, m) patch indices.
        """
        if self.config.encode == "all":
            embedded = embed_patches(self.encoder, patches)
            hidden = self.mask_token.to(embedded.dtype).expand(len(patches), masked.shape[1], -1)
            embedded = embedded.scatter(1, masked[..., None].expand_as(hidden), hidden)
            encoded = encoder_tokens(self.encoder, patches, hidden=embedded)
            tokens = (
                encoded if self.linear else self.decoder_embed(encoded) + self.decoder_positions
            )
            return self._heads(tokens, masked + self.prefix)
        encoded = self.decoder_embed(
            encoder_tokens(self.encoder, patches, visible)
        )  # (B, R + V, E)
        place = self.decoder_positions[0, self.prefix :]  # (N, E); those of the prefix are zero
        seen = encoded[:, self.prefix :] + nn.functional.embedding(visible, place)
        hidden = self.mask_token + nn.functional.embedding(masked, place)
        tokens = torch.cat(
            [encoded[:, : self.prefix].to(seen.dtype), seen, hidden.to(seen.dtype)], 1
        )
        return self._heads(tokens, None, last=masked.shape[1])

    def _heads(self, tokens: Tensor, at: Tensor | None, last: int = 0) -> Prediction:
        """Say something of the tokens at `at` (B, m), or of the `last` ones."""

        def asked(decoder: Decoder | None) -> Tensor:
            if at is None:
                assert decoder is not None
                return decoder(tokens, last)
            return gather(tokens if decoder is None else decoder(tokens), at)

        z = asked(self.decoder)
        category = self.category(z)[..., 0] if self.category is not None else None
        difficulty = self.rank(asked(self.ranking))[..., 0] if self.rank is not None else None
        return Prediction(self.predict(z), category, difficulty)

    def predicted_difficulty(self, patches: Tensor) -> Tensor:
        """What the ranking decoder says of all patches of whole images, (B, N), as HPM's teacher does."""
        assert self.rank is not None
        assert self.ranking is not None
        tokens = self.decoder_embed(encoder_tokens(self.encoder, patches)) + self.decoder_positions
        return self.rank(self.ranking(tokens)[:, self.prefix :])[..., 0]


def build_autoencoder(config: PretrainConfig, spec: ImageSpec) -> MaskedAutoencoder:
    """The model of a run, with the parts that its losses and its selection ask for."""
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
        p = config.model.patch_size
        sizes = {
            "stats": 3 * spec.channels,
            "context": 4,
            "raw": spec.channels * p * p,
            "tokens": config.model.width,
        }
        model.centroids = DatasetClusters(selection.clusters, sizes[selection.features])
    return model
