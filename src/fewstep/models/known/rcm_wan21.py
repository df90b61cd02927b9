"""rCM (2510.08431, NVlabs/rcm): Wan 2.1 1.3B and 14B in 1 to 4 steps.

It predicts the flow of rectified flow at times that are given as angles: the first is that of sigma 80, so sampling begins with
80/81 of pure noise at t = 80/81. x0 and fresh noise in between, no guidance. The weights are a `.pt` file with the names of Wan's
authors behind `net.`; the patch embedding is stored as a matrix.
"""

from fewstep.diffusion import CFG, Angles, Contract, Renoise
from fewstep.models.known.system import Known

RCM_WAN21 = Known(
    name="rcm-wan21",
    what="Wan 2.1 1.3B and 14B text-to-video in 1 to 4 steps: score-regularised consistency (rCM) by NVIDIA",
    source="github.com/NVlabs/rcm",
    bases=("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Wan-AI/Wan2.1-T2V-14B-Diffusers"),
    network="Wan",
    holds="weights",
    files=r"(^|[^a-z])rcm[-_].*wan2\.?1|(^|[^a-z])rcm-wan",
    contract=Contract(grid=Angles(sigma_max=80.0), sampler=Renoise(), steps=4, guidance=CFG(scale=1.0)),
    size={"num_frames": 77},
    licence="Apache-2.0",
    facts={
        "times, solver, no guidance, frames": "github.com/NVlabs/rcm rcm/inference/wan2pt1_t2v_rcm_infer.py",
        "key names": "the same file (net. is dropped) and rcm/networks/wan2pt1.py (patch_embedding is linear)",
        "licence": "github.com/NVlabs/rcm LICENSE.txt",
    },
    unverified="the licence of the weights' own page; that of the repository was taken",
)
