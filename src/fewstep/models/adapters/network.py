"""A network of diffusers split into three parts: loading its weights, and rebuilding it for comparison."""

from __future__ import annotations

from abc import abstractmethod
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin
from torch import Tensor

from fewstep.core.types import Cond
from fewstep.models.backbone import Backbone, Original


class DiffusersBackbone(Backbone):
    """Its modules are those of one `network`, whose constructor's arguments are `args["config"]`."""

    network: ClassVar[type[ModelMixin]]
    """Class of diffusers for this family."""
    folders: ClassVar[tuple[str, ...]] = ("transformer",)

    def load(self, folder: Path, part: str | None = None) -> None:
        """Take the weights of a folder in diffusers' layout, of its `part` if not the usual one, as float32."""
        self._hold(
            self.network.from_pretrained(
                folder, subfolder=part or self.folders[0], torch_dtype=torch.float32, use_safetensors=True
            )
        )

    def original(self) -> Original:
        self.require_plain()
        network = self._rebuilt()
        return Original({self.folders[0]: network}, partial(self.by_original, network))

    @abstractmethod
    def by_original(self, network: Any, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """What diffusers' own forward makes of the inputs of this one."""

    @abstractmethod
    def _hold(self, network: Any) -> None:
        """Make the modules of `network` this backbone's own. ValueError where it does what is not read."""

    def _of_image(self, cond: Cond, name: str) -> Tensor:
        """What a condition says of the image. ValueError where it says nothing."""
        if name not in cond.extra:
            raise ValueError(
                f"this {type(self).__name__} is an image-to-video network, and the condition has no {name}; give image=... "
                "(--image), or train on data with images: Latents that were prepared with this model, StoredPairs, Prompts "
                "of a .csv"
            )
        return cond.extra[name]

    def _require_whole(self, whole: bool, x: Tensor) -> None:
        """ValueError unless latents are of a `whole` clip: which of its frames they are is not known."""
        if not whole:
            raise ValueError(
                f"this {type(self).__name__} is an image-to-video network for whole clips, and was given "
                f"latents of {x.shape[2]} frames; methods that look at single frames (AVDM2, FlowMatching with "
                "image_fraction) cannot train it"
            )

    def _rebuilt(self) -> ModelMixin:
        """A `network` that holds this backbone's very tensors by diffusers' names, frozen, in eval mode."""
        weights = {self.foreign(name): tensor for name, tensor in self.state_dict().items()}
        with init_empty_weights(include_buffers=False):  # buffers that are not saved are computed
            made = self.network.from_config(self.args["config"])
        made.load_state_dict(weights, assign=True)
        device = next(iter(weights.values())).device
        for buffer in made.buffers():
            buffer.data = buffer.data.to(device)
        return made.requires_grad_(False).eval()
