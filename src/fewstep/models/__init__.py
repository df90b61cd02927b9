"""Networks: denoiser and backbone, autoencoder, text encoder, discriminator heads, feature network."""

from fewstep.models.autoencoder import FrameAutoencoder
from fewstep.models.backbone import Backbone, Context, Output, State, Tokens
from fewstep.models.bundle import VideoModel
from fewstep.models.card import Card
from fewstep.models.denoiser import Denoiser
from fewstep.models.discriminators import BlockHead, FeatureHeads, JointHead, QueryHead
from fewstep.models.features import ClipFeatures
from fewstep.models.fingerprint import fingerprint
from fewstep.models.lora import Lora
from fewstep.models.networks import NETWORKS
from fewstep.models.spec import Spec
from fewstep.models.text import TextEncoder
from fewstep.models.video_dit import VideoDiT

__all__ = [
    "NETWORKS", "Backbone", "BlockHead", "Card", "ClipFeatures", "Context", "Denoiser", "FeatureHeads", "FrameAutoencoder",
    "JointHead", "Lora", "Output", "QueryHead", "Spec", "State", "TextEncoder", "Tokens", "VideoDiT", "VideoModel", "fingerprint",
]  # fmt: skip
