"""Public few-step models and how they are sampled: one small file for each, collected here."""

from fewstep.models.known.animatediff_lightning import ANIMATEDIFF_LIGHTNING
from fewstep.models.known.animatelcm import ANIMATELCM
from fewstep.models.known.causal_forcing import CAUSAL_FORCING
from fewstep.models.known.causal_forcing_1step import CAUSAL_FORCING_1STEP
from fewstep.models.known.causal_forcing_2step import CAUSAL_FORCING_2STEP
from fewstep.models.known.causal_forcing_framewise import CAUSAL_FORCING_FRAMEWISE
from fewstep.models.known.causvid import CAUSVID
from fewstep.models.known.dmd2_sdxl import DMD2_SDXL
from fewstep.models.known.fasthunyuan import FASTHUNYUAN
from fewstep.models.known.fastwan22_5b import FASTWAN22_5B
from fewstep.models.known.fastwan_sparse import FASTWAN_SPARSE
from fewstep.models.known.hyper_sd15 import HYPER_SD15
from fewstep.models.known.hyper_sdxl import HYPER_SDXL
from fewstep.models.known.krea_realtime import KREA_REALTIME
from fewstep.models.known.lcm_dreamshaper import LCM_DREAMSHAPER
from fewstep.models.known.lcm_lora_sd15 import LCM_LORA_SD15
from fewstep.models.known.longlive import LONGLIVE
from fewstep.models.known.ltx_distilled import LTX_DISTILLED
from fewstep.models.known.rcm_wan21 import RCM_WAN21
from fewstep.models.known.rolling_forcing import ROLLING_FORCING
from fewstep.models.known.sdxl_lightning import SDXL_LIGHTNING
from fewstep.models.known.self_forcing import SELF_FORCING
from fewstep.models.known.system import Known
from fewstep.models.known.turbodiffusion import TURBODIFFUSION
from fewstep.models.known.wan21_lightx2v import WAN21_LIGHTX2V
from fewstep.models.known.wan22_lightning import WAN22_LIGHTNING

KNOWN: tuple[Known, ...] = (
    WAN22_LIGHTNING, WAN21_LIGHTX2V, FASTWAN22_5B, RCM_WAN21, LTX_DISTILLED, FASTHUNYUAN, ANIMATELCM, ANIMATEDIFF_LIGHTNING,
    LCM_LORA_SD15, LCM_DREAMSHAPER, HYPER_SD15,
    CAUSVID, SELF_FORCING, CAUSAL_FORCING, CAUSAL_FORCING_FRAMEWISE, CAUSAL_FORCING_2STEP, CAUSAL_FORCING_1STEP, LONGLIVE,
    FASTWAN_SPARSE, TURBODIFFUSION, ROLLING_FORCING, KREA_REALTIME, SDXL_LIGHTNING, HYPER_SDXL, DMD2_SDXL,
)  # fmt: skip
"""First those that can be imported, then those of which something is missing here."""

__all__ = ["KNOWN", "Known"]
