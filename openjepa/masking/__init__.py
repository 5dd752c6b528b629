"""Which patches are seen and which are predicted.

I-JEPA, section 3 and table 6 (Assran et al., 2023, https://arxiv.org/abs/2301.08243); iBOT's hidden tokens.
Masks are made on the host, beside the image decoding, so that they arrive with their batch and no device ever waits for them.
"""

from openjepa.masking.blocks import (
    about,
    batch_shapes,
    block_indices,
    block_map,
    block_shapes,
    draw_shape,
    place,
    relative,
    visible_patches,
)
from openjepa.masking.door import check, check_tokens, expected_context
from openjepa.masking.masks import Grid, MaskingConfig, Masks, Range
from openjepa.masking.replication import check_released, released, released_size
from openjepa.masking.strategies import (
    block,
    even,
    multiblock,
    packed,
    random,
    rasterized,
    sample,
    sample_share,
)
from openjepa.masking.tokens import TokenMaskingConfig, TokenMasks, hide_tokens, rectangles

__all__ = [
    "Grid",
    "MaskingConfig",
    "Masks",
    "Range",
    "TokenMaskingConfig",
    "TokenMasks",
    "about",
    "batch_shapes",
    "block",
    "block_indices",
    "block_map",
    "block_shapes",
    "check",
    "check_released",
    "check_tokens",
    "draw_shape",
    "even",
    "expected_context",
    "hide_tokens",
    "multiblock",
    "packed",
    "place",
    "random",
    "rasterized",
    "rectangles",
    "relative",
    "released",
    "released_size",
    "sample",
    "sample_share",
    "visible_patches",
]
