"""CLIPScore: how well a clip shows its prompt, scored by CLIP frame by frame."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import CLIPModel, CLIPProcessor

from fewstep.data.video import to_pixels
from fewstep.evaluate.cases import Cases
from fewstep.evaluate.inputs import fingerprint_folder


class Clip:
    """CLIP's normalised embeddings of frames and prompts.

    The embeddings are CLIP's projected ones. Frames are rounded to 8 bits, as in a file, and go through CLIP's own processor.
    `folder` was written by `save_pretrained` of CLIPModel and CLIPProcessor. Prompts too long for CLIP are cut; `cut` is
    their number.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"{folder} has no config.json; give a folder with CLIPModel and CLIPProcessor (save_pretrained)"
            )
        self._network = CLIPModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval().to(device)
        self._processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
        self._device = device
        self.name = f"{folder.name} {fingerprint_folder(folder)}"
        self.cut = 0

    @torch.inference_mode()
    def frames(self, clip: Tensor) -> Tensor:
        """Normalised embeddings `[F, E]` of the frames of a clip `[3, F, H, W]` in [-1, 1]."""
        pixels = self._processor.image_processor(list(to_pixels(clip).numpy()), return_tensors="pt").pixel_values
        states = self._network.vision_model(pixel_values=pixels.to(self._device)).pooler_output
        return normalize(self._network.visual_projection(states), dim=-1)

    @torch.inference_mode()
    def prompt(self, prompt: str) -> Tensor:
        """Normalised embedding `[1, E]` of a prompt."""
        tokenizer = self._processor.tokenizer
        longest = self._network.config.text_config.max_position_embeddings
        self.cut += len(tokenizer(prompt).input_ids) > longest
        tokens = tokenizer([prompt], truncation=True, max_length=longest, return_tensors="pt").to(self._device)
        states = self._network.text_model(**tokens).pooler_output
        return normalize(self._network.text_projection(states), dim=-1)


class ClipScore:
    """`100 cos(image, text)`, mean over the frames of a clip: `clip_score` `[n]` for the clips of a suite.

    This is the form that video papers report: without the clamp at 0 and the factor 2.5 of Hessel et al. (2021, 2104.08718).
    """

    def __init__(self, folder: Path, cases: Cases, device: torch.device) -> None:
        self._clip, self._seeds = Clip(folder, device), cases.seeds_per_prompt
        self.name = self._clip.name
        self._texts_PE = torch.cat([self._clip.prompt(prompt) for prompt in cases.prompts])

    @property
    def cut(self) -> int:
        """Number of prompts that are too long for CLIP."""
        return self._clip.cut

    def __call__(self, frames: Tensor, first: int, last: int) -> Mapping[str, Tensor]:
        """Scores of the clips `[n, 3, F, H, W]` in [-1, 1] of prompts `first` up to `last`, ordered by prompt."""
        texts_BE = self._texts_PE[first:last].repeat_interleave(self._seeds, 0)
        cosines = [self._clip.frames(clip) @ text for clip, text in zip(frames, texts_BE, strict=True)]
        return {"clip_score": 100 * torch.stack(cosines).mean(1)}
