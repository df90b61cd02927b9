"""Checks that the network equals the original: diffusers' forward, times and pipeline; text, guidance and batches."""

from __future__ import annotations

import re

import torch
from PIL import Image

from fewstep.attention import Dense
from fewstep.core import Cond, Seeds
from fewstep.core.pixels import to_uint8
from fewstep.diffusion import CFG, FlowSchedule, MultistepTimesteps
from fewstep.evaluate.conformance.subject import Fault, Measured, NotApplicable, Subject, relative, worst

_TIMES = (1.0, 0.7, 0.3, 0.05)


def forward(s: Subject) -> Measured:
    """The output equals the output of diffusers' own forward, at several times.

    The adapter differs from diffusers before, between or after the blocks: compare `embed` and `head` line by line with the
    forward of the diffusers class. Usual causes: the factor 1000 of the timestep, the order of rows and columns in patches,
    the mask of padded text, rotary positions.
    """
    original = s.original
    pairs = [
        (s.dense(s.x_t[:1], t, s.cond[:1]).raw, original.forward(s.x_t[:1], t, s.cond[:1])) for t in map(s.time, _TIMES)
    ]
    return Measured(worst(pairs), s.tolerance)


def weights(s: Subject) -> Measured:
    """The weights equal those in the model's files, name by name and bit by bit.

    The folder's weights belong to another version of the model than its config, or a file is missing: weights without a file
    are random. In a new adapter: its weight names do not map back to those of diffusers, so an export would be wrong.
    """
    if "denoiser" not in s.model.card.sources:
        raise NotApplicable("the weights are in a fewstep folder, not in one of diffusers")
    layout, count = s.layout, 0
    for folder, network in s.original.networks.items():
        stored = layout.weights(folder, network.state_dict())
        unread = getattr(network, "_keys_to_ignore_on_load_unexpected", None) or ()
        if odd := [name for name in stored.odd(network) if not any(re.search(pattern, name) for pattern in unread)]:
            raise Fault(f"{folder}: files and network differ in these names or shapes: {', '.join(odd[:4])}")
        for name, tensor in network.state_dict().items():
            if not torch.equal(stored[name], tensor.cpu()):
                raise Fault(f"{folder}: {name} differs from its file")
            count += 1
    return Measured(0.0, 0.0, f"{count} tensors")


def times(s: Subject) -> Measured:
    """The sampling times equal those of the model's scheduler.

    The card's contract was read wrongly: look at `shift` (`flow_shift`) for flow models, and at `timestep_spacing`,
    `steps_offset` and `set_alpha_to_one` for DDPM-trained models. With a wrong shift, clips are washed out or noisy.
    """
    contract, layout = s.model.card.contract, s.layout
    if contract.trained:
        raise NotApplicable("a student has its own times, not those of the model's scheduler")
    if s.model.card.provenance.get("preset", "").startswith("authors"):
        raise NotApplicable("the card follows the model's authors (preset), not its scheduler")
    from fewstep.models.adapters.export.pipeline import recommended_times, scheduled_times

    if isinstance(contract.grid, FlowSchedule | MultistepTimesteps):
        theirs = scheduled_times(layout, s.options.steps)
    else:
        theirs = recommended_times(layout, s.options.steps, s.tokens)
    ours = contract.times(s.options.steps)
    return Measured(max(abs(a - b) for a, b in zip(ours, theirs, strict=True)), 1e-5)


def pipeline(s: Subject) -> Measured:
    """Sampling a few steps gives the latents of diffusers' pipeline for the same sampler, noise, text and guidance.

    The network is right, but its output is used wrongly: look at the card's `kind` (flow, eps, v, x0) and `path`, the sign of
    the flow, the relation of t and timestep, the guidance scale, and the scale of the initial noise.
    """
    s.require("forward", "times", "padding", "batch", "guidance")
    layout = s.layout
    from fewstep.models.adapters.export.pipeline import NoCounterpart, sample

    contract, options = s.model.card.contract, s.options
    if s.dtype != torch.float32:
        raise NotApplicable("diffusers' pipeline samples in float32")
    if not isinstance(getattr(s.backbone, "pattern", Dense()), Dense):
        raise NotApplicable("diffusers' pipeline does not run causal models")
    steps = contract.steps if contract.trained else options.steps
    noise = Seeds((options.seed,), str(s.model.device)).randn((1, *s.shape), "start")
    try:
        pictures = {name: Image.fromarray(to_uint8(x).permute(1, 2, 0).numpy()) for name, x in s.images().items()}
        theirs = sample(s.model, layout, noise, s.cond[:1], s.uncond[:1], steps, pictures)
    except NoCounterpart as reason:
        raise NotApplicable(str(reason)) from None
    ours = s.model.latents(s.prompts[:1], **s.images(), num_inference_steps=steps, seed=options.seed)
    return Measured(
        relative(ours, theirs), 10 * s.tolerance
    )  # errors add up over the steps, and guidance enlarges them


def text(s: Subject) -> Measured:
    """The output depends on the prompt.

    The text states do not reach the network, or all prompts give the same states: look at the tokenizer and at the mask.
    """
    s.require("forward")
    words, negative = (s.network(s.x_t, s.t, cond).raw for cond in (s.cond, s.uncond))
    return Measured(relative(words, negative), 1e-6, at_least=True)


def batch(s: Subject) -> Measured:
    """A batch of two samples gives the same output as two batches of one, with two times and two prompts.

    Samples influence each other: a time or condition is taken from the first sample, a norm runs over the batch, or frames are
    folded into the batch in the wrong order.
    """
    both = s.network(s.x_t, s.t, s.cond).raw
    alone = [s.network(s.x_t[i : i + 1], s.t[i : i + 1], s.cond[i : i + 1]).raw for i in range(2)]
    return Measured(relative(both, torch.cat(alone)), s.tolerance)


def guidance(s: Subject) -> Measured:
    """Guidance is `uncond + w (cond - uncond)`: the conditional output at w = 1, the unconditional at 0, the formula at 3.

    The model uses another convention: with `cond + w (cond - uncond)`, w is one less (`CFG.from_offset`). Or the two
    conditions are joined in one order and split in another.
    """
    s.require("batch")
    words, negative = (s.network(s.x_t, s.t, cond).raw for cond in (s.cond, s.uncond))
    pairs = []
    for scale in (0.0, 1.0, 3.0):
        guided = CFG(scale=scale)
        made = guided(s.network, s.x_t, s.t, s.cond, s.uncond).raw
        pairs.append((made, negative + scale * (words - negative)))
    return Measured(worst(pairs), s.tolerance)


def padding(s: Subject) -> Measured:
    """A condition is the same alone and in a batch: text states do not depend on the other prompts of the batch.

    The text encoder pads to the longest prompt of a batch, and the network reads the padding.
    """
    alone: Cond = s.conditions(s.prompts[:1])[0]
    pairs = list(zip(s.cond[:1].tensors, alone.tensors, strict=True))
    return Measured(worst([(a, b) for a, b in pairs if b.is_floating_point()]), 0.05)  # encoders may be bfloat16
