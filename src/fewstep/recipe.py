"""A recipe: model x method x data x settings, as one frozen object with a strict printed form.

`distill(...)` is the front door; the command line only builds its arguments.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.core.build import RecipeError, digest, dump
from fewstep.core.env import place
from fewstep.core.lock import holding
from fewstep.core.yaml import read_text
from fewstep.data import Data, partition_of, require
from fewstep.engine import Settings
from fewstep.engine.loop import complete
from fewstep.engine.prepare import require_possible, require_processes
from fewstep.engine.probe import WorldProbe
from fewstep.engine.result import result_from
from fewstep.engine.student import equipped
from fewstep.evaluate.machine import describe_machine, versions
from fewstep.methods.base import Method
from fewstep.models.bundle import VideoModel
from fewstep.models.card import Card
from fewstep.models.results import RESULTS, result_in
from fewstep.models.source import ModelSource, Pretrained, Scratch
from fewstep.written import FILE, Written


@dataclass(frozen=True, kw_only=True)
class Recipe(Written):
    """Everything that decides a run's numbers.

    `Recipe.load(path)` reads one, `.save(path)` writes it with all defaults, `.hash` names it, `.run(output)` runs it.
    """

    model: ModelSource
    """Model the run starts from: the teacher, or networks made from scratch."""
    method: Method
    data: Data
    settings: Settings
    probe: WorldProbe | None = None
    """Probe that scores the student during the run and keeps the best one. null: keep the last student."""

    @classmethod
    def recognise(cls, tree: Any, path: Path | str) -> None:
        if isinstance(tree, dict) and "stages" in tree:
            raise RecipeError(f"{path} has stages; fewstep.Pipeline.load reads it")

    @property
    def hash(self) -> str:
        """12 characters that name the run. Two hashes are equal exactly if all values that decide the numbers are equal.

        `settings.parallel`, which spreads a run over processes, does not count.
        """
        return digest(without_parallel(self.tree()))

    def check(self, card: Card | None = None, begun: Card | None = None) -> Card:
        """Refuse what cannot work before any weight is loaded, and return the card of the model the run starts from.

        `card` stands for a model that does not exist yet, `begun` for a student at `settings.start` that does not. The data must
        fit the model and the method, the method the model's part that it trains, and the settings all of them.
        """
        require(self.data, self.method)
        card, name = self.model.card() if card is None else card, type(self.method).__name__
        if self.method.part not in card.parts:
            have = ", ".join(card.parts)
            raise RecipeError(
                f"recipe: {name} trains the {self.method.part}, but the model has only {have}; "
                f"name a {self.method.part} under model"
            )
        self.method.contract(card.contract)
        require_possible(self.method, self.settings, card, self.probe, begun)
        self.data.check_card(card)
        return card

    def run(self, output: Path | str, *, quiet: bool = False) -> VideoModel:
        """Train and return the student. The same call resumes a stopped run. The result is also in `output/student`."""
        return result_from(self.complete(output, quiet=quiet), self.settings.device)

    def complete(self, output: Path | str, *, quiet: bool = False) -> Path:
        """Train, and return the folder of the result."""
        output = Path(output)
        card = self.check()
        if output.exists() and not output.is_dir():
            raise RecipeError(f"{output} is a file; give a folder as output")
        require_processes(self.settings)
        with holding(output) if place().rank == 0 else nullcontext():
            return self._complete(output, card, quiet=quiet)

    def _complete(self, output: Path, card: Card, *, quiet: bool) -> Path:
        leads = place().rank == 0
        if leads:
            self._claim(output)
        world, settings = place().world_size, equipped(self.settings, self.method, card)
        cut = (world > 1 and settings.lora is None) or settings.brings(world)
        cut = cut and self.method.part == "denoiser" and not settings.transforms  # which may change every weight
        model = self.model.load(leave=("denoiser",) if cut else ())  # each process then keeps its share only
        folder = complete(
            model, self.method, self.data, settings, output,
            probe=self.probe, provenance=self._provenance(model), quiet=quiet,
        )  # fmt: skip
        if leads:
            self.save(folder)
        return folder

    def finished(self, output: Path) -> bool:
        """Whether `output` has the complete result of exactly this recipe."""
        made = result_in(output)
        return made is not None and (made / FILE).is_file() and Recipe.load(made).hash == self.hash

    def _claim(self, output: Path) -> None:
        """Make `output` this recipe's folder. Refuse if another recipe has left checkpoints or a result there."""
        if (output / FILE).is_file() and any((output / made).exists() for made in ("checkpoints", "best", *RESULTS)):
            try:
                theirs = Recipe.load(output / FILE)
            except RecipeError as error:
                raise RecipeError(
                    f"{output} holds a recipe that cannot be compared: {error}. Give another output folder."
                ) from None
            if theirs.hash != self.hash:
                changed = "; ".join(map(str, theirs.diff(self)[:4]))
                raise RecipeError(
                    f"{output} holds run {theirs.hash} of another recipe ({changed}). Give another output folder."
                )
        if not ((output / FILE).is_file() and self._printed == read_text(output / FILE)):
            self.save(output / FILE)

    def _provenance(self, model: VideoModel) -> dict[str, str]:
        """The student's provenance. The model's own provenance is kept, under `teacher.` if the model is the teacher."""
        distilled, before = not isinstance(self.model, Scratch), model.card.provenance
        chain = {f"teacher.{key}" if distilled else key: value for key, value in before.items()}
        machine = describe_machine(self.settings.device)
        chain |= {"licence": before["licence"]} if distilled and "licence" in before else {}
        chain |= partition_of(self.data)
        return {
            **chain,
            "recipe": self.hash,
            "method": type(self.method).__name__,
            "cite": self.method.cite,
            "teacher": f"{model.card.name} {model.fingerprint(self.method.part)}",
            "data": type(self.data).__name__,
            "data settings": json.dumps(dump(self.data, Data), sort_keys=True),
            "machine": f"{machine.accelerator or machine.cpu}, {machine.cores} CPU cores, {machine.system}",
            "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
        }


def distill(
    *,
    method: Method,
    settings: Settings,
    output: Path | str,
    model: ModelSource | Path | str = "world",
    data: Data | None = None,
    probe: WorldProbe | None = None,
    quiet: bool = False,
) -> VideoModel:
    """Distil `model` with `method` and return the student, which is also in `output/student`.

    `model` is a source, a folder, or `world`, the built-in teacher. `data` defaults to clips of the built-in world.
    Calling it again with the same arguments resumes a stopped run.
    """
    from fewstep.world.data import WorldClips

    source = model if isinstance(model, ModelSource) else Pretrained(source=str(model))
    data = WorldClips(num_frames=source.card().num_frames) if data is None else data
    recipe = Recipe(model=source, method=method, data=data, settings=settings, probe=probe)
    return recipe.run(output, quiet=quiet)


def without_parallel(tree: dict[str, Any]) -> dict[str, Any]:
    """A recipe's tree without `settings.parallel`."""
    return tree | {"settings": {key: value for key, value in tree["settings"].items() if key != "parallel"}}
