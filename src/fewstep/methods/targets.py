"""Losses: functions of tensors, each with its equation and its reduction. Those of discriminators are in `gan`.

Shapes: latents `[B, C, F, H, W]`. Every loss is a mean over all elements, so that the weights of terms do not depend on batch
size or resolution. No function here calls a network.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fewstep.diffusion import Prediction, target
from fewstep.diffusion.path import broadcast

FLOOR = 1e-5
"""Added to the DMD normaliser, in units of the latents. It matters only if the student equals its teacher."""


def mse(a: Tensor, b: Tensor, weight: Tensor | None = None) -> Tensor:
    """`mean w (a - b)^2`; `weight` is per sample `[B]` or per frame `[B, F]`. Mean over all elements."""
    error = (a - b).square()
    return (error if weight is None else broadcast(weight, error) * error).mean()


def pseudo_huber(a: Tensor, b: Tensor, c: float = 1e-3, weight: Tensor | None = None) -> Tensor:
    """`mean w (sqrt((a - b)^2 + c^2) - c)` (2310.14189): quadratic below `c`, linear above. Mean over all elements.

    `c = 0` is the mean absolute error.
    """
    error = ((a - b).square() + c * c).sqrt() - c if c > 0 else (a - b).abs()
    return (error if weight is None else broadcast(weight, error) * error).mean()


def toward(x: Tensor, grad: Tensor) -> Tensor:
    """The loss whose gradient in `x` is `grad / numel`: mean reduction (2311.18828, eq. 7; DreamFusion's trick).

    Its value, `mean grad^2 / 2`, does not measure progress. It equals `|x - stop(x - grad)|^2 / 2`, written so that a small
    gradient on a large latent loses no digits in float32.
    """
    grad = grad.detach()
    return ((x - x.detach()) * grad).mean() + grad.square().mean() / 2


def dmd_normaliser(x0: Tensor, real: Tensor, floor: float = FLOOR) -> Tensor:
    """Per sample `1 / (mean |x0 - real| + floor)` `[B]` (2311.18828, eq. 8), from the *guided* teacher prediction."""
    return _one_over((x0.detach() - real).abs().flatten(1).mean(1), floor)


def frame_normaliser(x0: Tensor, real: Tensor, floor: float = FLOOR) -> Tensor:
    """`dmd_normaliser` per frame, `[B, F]`, for clips whose frames have different times.

    The papers normalise a whole clip. With a time per frame, the noisiest frames, where teacher and sample differ most, would
    then set the scale of the clean frames.
    """
    return _one_over((x0.detach() - real).abs().mean((1, *range(3, x0.ndim))), floor)


def _one_over(distance: Tensor, floor: float) -> Tensor:
    return 1 / (distance.to(torch.promote_types(distance.dtype, torch.float32)) + floor)


def distribution_matching(
    x0: Tensor, real: Tensor, fake: Tensor, weight: Tensor | None = None, *, keep: Tensor | None = None
) -> Tensor:
    """A loss whose gradient in `x0` is that of the reverse KL from student to teacher (2405.14867, eq. 2-3). Mean over all
    elements.

    `fake` is the critic's x0 prediction and `real` the teacher's, from the same student sample with noise. Where the student
    has more mass than the teacher, `fake` is nearer to `x0`, and descent moves `x0` towards `real`. `weight`, `[B]` or
    `[B, F]`, replaces `dmd_normaliser`; `a^2/s^2` gives the gradient of KL(student_t | teacher_t) itself. `keep`,
    of mean 1 and the same shapes, says how much each sample or frame counts besides.
    """
    weight = dmd_normaliser(x0, real) if weight is None else weight
    gap = (fake - real).detach()
    gap = gap if keep is None else broadcast(keep, gap) * gap
    return toward(x0, broadcast(weight, gap) * gap)


def denoising(prediction: Prediction, x0: Tensor, eps: Tensor, weight: Tensor | None = None) -> Tensor:
    """Regression in the network's own prediction kind: `mean w (raw - (p x0 + q eps))^2`. Mean over all elements.

    For a flow prediction this is conditional flow matching (2210.02747, eq. 23).
    """
    return mse(prediction.raw, target(prediction.kind, x0, eps, prediction.t, prediction.path), weight)


def preference(win: Tensor, lose: Tensor, mean: Tensor, reference: Tensor, scale: float | Tensor) -> Tensor:
    """`-log sigmoid(scale/2 (D_w - D_l))`, `D_y = |y - reference|^2 - |y - mean|^2` (2410.03190; Diffusion-DPO, 2311.12908).

    Two outcomes of a step `N(mean, sd^2 I)`, `[B, C, F, H, W]`; `scale` is `beta / sd^2`, `[B]` or one number. Norms are means
    over the elements of a clip. At `mean = reference` it is `log 2`. `D_w - D_l` is computed as
    `2 (win - lose) . (mean - reference)`, which equals it and loses no digits.
    """
    gain = ((win - lose).detach() * (mean - reference.detach())).flatten(1).mean(1)
    return F.softplus(-scale * gain).mean()


def clipped_policy(log_ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """`-mean min(rho A, clamp(rho, 1 - clip, 1 + clip) A)`, `rho = exp(log_ratio)` (PPO, 1707.06347; GRPO, 2402.03300).

    Any shape. There is no gradient where rho has already gone past the clip in the direction that A asks for.
    """
    ratio = log_ratio.exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage).mean()
