"""Recipes in stages: each stage starts from the result of the one before. One command, one folder, one chain of provenance."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from fewstep.core.build import RecipeError, digest
from fewstep.core.env import place
from fewstep.data import Data, Part, Partition
from fewstep.engine import Settings
from fewstep.engine.phases import require_every_step
from fewstep.engine.probe import WorldProbe
from fewstep.engine.result import result_from, result_of, role_of
from fewstep.engine.student import transforms_of
from fewstep.methods.base import Method
from fewstep.models.bundle import VideoModel
from fewstep.models.card import Card
from fewstep.models.results import result_in
from fewstep.models.source import ModelSource, Pretrained, Previous, Scratch
from fewstep.recipe import Recipe, without_parallel
from fewstep.written import FILE, Written, tree_of


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One of several recipes. Its student starts from the student of the stage before."""

    method: Method
    data: Data
    settings: Settings
    model: ModelSource | None = None
    """Teacher of the stage. null: the teacher of the stage before; if that stage trained a model from scratch, or one of
    the two trains another part than the denoiser, the result of that stage. `{type: Previous}`: always the student of the
    stage before."""
    probe: WorldProbe | None = None
    """Probe of the stage, as in a recipe."""


@dataclass(frozen=True)
class Planned:
    """A stage as it will be run."""

    name: str
    folder: Path
    recipe: Recipe
    card: Card
    """Card of its teacher, as far as it is known before the earlier stages have run."""
    begun: Card | None
    """Card of the student that it starts from; None: a copy of its teacher."""

    @property
    def result(self) -> Path:
        """The folder of the stage's result, whether it is there yet or not."""
        return result_in(self.folder) or self.folder / result_of(self.recipe.method, self.card)

    @property
    def alone(self) -> Recipe:
        """The recipe without its `settings.start`, the earlier student, which does not exist yet: this can be planned."""
        return replace(self.recipe, settings=replace(self.recipe.settings, start=None))

    def check(self) -> None:
        """As `Recipe.check`."""
        self.recipe.check(self.card, self.begun)


@dataclass(frozen=True, kw_only=True)
class Pipeline(Written):
    """Several recipes in one file, as `stages:` by name. Used as `Recipe` is."""

    stages: dict[str, Stage]
    """Stages in the order of execution. A stage's folder has its number and name: `1-regression`."""

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("the recipe has no stages; give at least one")
        for number, (name, stage) in enumerate(self.stages.items()):
            if not name.replace("_", "").isalnum():
                raise ValueError(f"the name of a stage is a word such as 'regression', got {name!r}")
            if number == 0 and (stage.model is None or isinstance(stage.model, Previous)):
                raise ValueError(f"the first stage, {name}, has no stage before it; give it a model")
            if number > 0 and stage.settings.start is not None:
                raise ValueError(
                    f"stage {name} starts where the stage before ends; leave out its settings.start, or write two recipes"
                )

    @property
    def hash(self) -> str:
        """12 characters that name the pipeline, like a recipe's hash. The order of stages counts."""
        return digest([[name, without_parallel(stage)] for name, stage in self.tree()["stages"].items()])

    def plan(self, output: Path) -> Iterator[Planned]:
        """Every stage with the folders that it will read and write."""
        before: Planned | None = None
        for number, (name, stage) in enumerate(self.stages.items(), 1):
            folder, settings = output / f"{number}-{name}", stage.settings
            if before is None:
                assert stage.model is not None
                model, card, begun = stage.model, stage.model.card(), None
            else:
                model, last, made = _teacher(stage, before), str(before.result), _made(before)
                if isinstance(model, Previous):
                    model, card, begun = Pretrained(source=last), made, None
                else:
                    card = before.card if model == before.recipe.model else model.card()  # it may not be made yet
                    settings, begun = replace(settings, start=last), made
            recipe = Recipe(model=model, method=stage.method, data=stage.data, settings=settings, probe=stage.probe)
            before = Planned(name, folder, recipe, card, begun)
            yield before

    def check(self) -> None:
        """Refuse a stage that cannot work before the first stage begins. The error names the stage."""
        self._require_one_part()
        stages = list(self.plan(Path("OUTPUT")))
        for planned in stages:
            try:
                planned.check()
            except (ValueError, FileNotFoundError) as error:
                raise RecipeError(f"stage {planned.name}: {error}") from error
        if stages[0].recipe.settings.start is None and stages[0].card.role == "teacher":
            try:
                require_every_step([(planned.name, planned.recipe.method, planned.card) for planned in stages])
            except ValueError as error:
                raise RecipeError(f"recipe: {error}") from error

    def _require_one_part(self) -> None:
        """Refuse (RecipeError) stages that train one student on several parts of the same partition."""
        seen = dict[Partition, tuple[str, int]]()
        for name, stage in self.stages.items():
            if isinstance(part := getattr(stage.data, "part", None), Part):
                other, index = seen.setdefault(part.by, (name, part.index))
                if index != part.index:
                    raise RecipeError(
                        f"stage {other} trains on part {index} of the prompts, and stage {name} on part {part.index}; give both "
                        f"one index: --stages.{other}.data.part.index {part.index}"
                    )

    def run(self, output: Path | str, *, quiet: bool = False) -> VideoModel:
        """Run the stages and return the last one's student. The same call resumes a stopped run.

        A finished stage is not run again. To run it again, delete its folder and the folders of later stages.
        """
        *_, last = self.stages.values()
        return result_from(self.complete(output, quiet=quiet), last.settings.device)

    def complete(self, output: Path | str, *, quiet: bool = False) -> Path:
        """Run the stages, and return the folder of the last one's result."""
        output = Path(output)
        self.check()
        if place().rank == 0:
            self._claim(output)
        for planned in self.plan(output):
            if not planned.recipe.finished(planned.folder):
                planned.recipe.complete(planned.folder, quiet=quiet)
        return planned.result

    def _claim(self, output: Path) -> None:
        """Write this recipe to `output`. Each stage checks its own folder."""
        if output.exists() and not output.is_dir():
            raise RecipeError(f"{output} is a file; give a folder as output")
        if (output / FILE).is_file() and "stages" not in tree_of(output):
            raise RecipeError(f"{output} holds the run of a recipe without stages. Give another output folder.")
        self.save(output / FILE)


def read(path: Path | str, overrides: list[tuple[str, str]], *, allow_imports: bool = False) -> Recipe | Pipeline:
    """A recipe, with stages or without. Errors as in `Written.load`."""
    tree = tree_of(path)
    staged = isinstance(tree, dict) and "stages" in tree
    if staged:
        return Pipeline.load(path, overrides, allow_imports=allow_imports)
    return Recipe.load(path, overrides, allow_imports=allow_imports)


def _teacher(stage: Stage, before: Planned) -> ModelSource:
    """The teacher of a stage: see `Stage.model`."""
    if stage.model is not None:
        return stage.model
    other = {stage.method.part, before.recipe.method.part} != {"denoiser"}
    return Previous() if other or isinstance(before.recipe.model, Scratch) else before.recipe.model


def _made(before: Planned) -> Card:
    """The card of a stage's future result, as far as it is known."""
    card, method = before.card, before.recipe.method
    prints = {part: known for part, known in card.fingerprints.items() if part != method.part}
    if method.part != "denoiser":
        return replace(card, fingerprints=prints)
    contract = method.contract(card.contract)
    transforms = transforms_of(card, before.recipe.settings, method)
    return replace(card, fingerprints=prints, transforms=transforms, contract=contract, role=role_of(method, card))
