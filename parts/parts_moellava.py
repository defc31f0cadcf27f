# SPDX-License-Identifier: Apache-2.0
"""The parts that come with the package, by name. A checkpoint carries a table of its own parts under this name."""

from ..configuration.user_encoder_config_moellava import MoellavaEncoderConfig
from .auto_encoder_moellava import AutoEncoder
from .biomedclip_encoder_moellava import BiomedClipEncoder
from .clip_encoder_moellava import ClipEncoder
from .dinov2_encoder_moellava import Dinov2Encoder
from .identity_projector_moellava import IdentityProjector
from .linear_projector_moellava import LinearProjector
from .mlp_projector_moellava import MlpProjector
from .modular_experts_moellava import Modular
from .older_qformer_projector_moellava import OlderQFormerProjector
from .part_table_moellava import (
    ENCODERS,
    OPTIONAL,
    PROJECTORS,
    detect_encoder_type,
    encoder_for,
    optional,
    projector_for,
)
from .perceiver_projector_moellava import PerceiverProjector
from .pool_mlp_projector_moellava import PoolMlpProjector
from .projector_moellava import Projector
from .qformer_projector_moellava import QFormerProjector
from .quantised_moellava import Quantised
from .routing_moellava import Routing
from .siglip_encoder_moellava import SiglipEncoder
from .simple_projector_moellava import SimpleProjector
from .sparse_layers_moellava import SparseLayers
from .vit_encoder_moellava import VitEncoder


for encoder in (AutoEncoder, BiomedClipEncoder, ClipEncoder, Dinov2Encoder, SiglipEncoder, VitEncoder):
    ENCODERS.enter(encoder.encoder_type, encoder, encoder)
PROJECTORS.enter("identity", IdentityProjector, Projector)
PROJECTORS.enter("linear", LinearProjector, Projector)
PROJECTORS.enter("mlp", MlpProjector, Projector)
PROJECTORS.enter("older_qformer", OlderQFormerProjector, Projector)
PROJECTORS.enter("perceiver", PerceiverProjector, Projector)
PROJECTORS.enter("pool_mlp", PoolMlpProjector, Projector)
PROJECTORS.enter("qformer", QFormerProjector, Projector)
PROJECTORS.enter("simple", SimpleProjector, Projector)
OPTIONAL["modular_experts"] = Modular
OPTIONAL["quantised"] = Quantised
OPTIONAL["routing"] = Routing
OPTIONAL["sparse"] = SparseLayers
OPTIONAL["user_encoder_config"] = MoellavaEncoderConfig

__all__ = ["ENCODERS", "OPTIONAL", "PROJECTORS", "detect_encoder_type", "encoder_for", "optional", "projector_for"]
