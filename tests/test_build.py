"""The strict builder: what it accepts, what it refuses and in which words."""

from __future__ import annotations

import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import pytest

from fewstep.core.bounds import Count, Fraction, Positive, require_bounds
from fewstep.core.build import At, Raw, RecipeError, build, build_arguments, digest, dump, load_yaml, to_yaml


class Shape(ABC):
    @abstractmethod
    def area(self) -> float: ...


@dataclass(frozen=True, kw_only=True)
class Square(Shape):
    side: float = 1.0

    def area(self) -> float:
        return self.side**2

    def __post_init__(self) -> None:
        if self.side <= 0:
            raise ValueError(f"side must be positive, got {self.side}")


@dataclass(frozen=True, kw_only=True)
class Ring(Shape):
    radius: float
    hole: float | None = None
    style: Literal["plain", "dotted"] = "plain"

    def area(self) -> float:
        return self.radius


@dataclass(frozen=True)
class Left:
    by: int = 1


@dataclass(frozen=True)
class Right:
    by: int = 1


@dataclass(frozen=True, kw_only=True)
class Optim:
    type: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-3


@dataclass(frozen=True, kw_only=True)
class Whole:
    critic_updates: int
    shape: Shape = Square()
    spare: Shape | None = None
    move: Left | Right = Left()
    optim: dict[str, Optim] = field(default_factory=dict)
    times: tuple[float, ...] = (1.0, 0.0)
    size: tuple[int, int] = (1, 2)
    shapes: tuple[Shape, ...] = ()
    compile: bool = False
    path: Path | None = None
    text: str | Optim = "world"
    seeds: int | tuple[int, ...] = 0
    notes: Any = None


NAMES = {"Square": Square, "Ring": Ring, "Optim": Optim}


def make(**tree: Any) -> Whole:
    return build(Whole, {"critic_updates": 5} | tree, NAMES)


def refusal(expected: Any = Whole, **tree: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        build(expected, {"critic_updates": 5} | tree, NAMES)
    return str(caught.value)


def test_builds_nested_objects() -> None:
    whole = make(
        shape={"type": "Ring", "radius": 2, "hole": "1e-5"},
        spare=None,
        move={"type": "Right", "by": 3},
        optim={"student": {"type": "muon", "lr": 1}},
        times=[1, 0.5, 0],
        size=[3, 4],
        shapes=[{"type": "Square"}, {"type": "Square", "side": 2.0}],
        compile=True,
        path="a/b",
        text={"lr": 2.0},
        seeds=[1, 2],
        notes={"anything": [1]},
    )
    assert whole.shape == Ring(radius=2.0, hole=1e-5)
    assert isinstance(whole.shape, Ring) and isinstance(whole.shape.radius, float)
    assert whole.move == Right(3)
    assert whole.optim == {"student": Optim(type="muon", lr=1.0)}
    assert whole.times == (1.0, 0.5, 0.0) and whole.size == (3, 4)
    assert whole.shapes == (Square(), Square(side=2.0))
    assert whole.path == Path("a/b") and whole.text == Optim(lr=2.0) and whole.seeds == (1, 2)


@pytest.mark.parametrize(
    "whole",
    [
        Whole(critic_updates=1),
        Whole(critic_updates=2, shape=Ring(radius=1.0), spare=Square(), move=Right(2), path=Path("x")),
        Whole(critic_updates=3, optim={"a": Optim(), "b": Optim(type="muon")}, shapes=(Ring(radius=3.0), Square())),
        Whole(critic_updates=4, text=Optim(lr=0.5), seeds=(3, 4), size=(7, 8), compile=True, notes=[1, {"a": None}]),
    ],
)
def test_dump_and_build_are_inverse_also_through_text(whole: Whole) -> None:
    tree = dump(whole)
    assert build(Whole, tree, NAMES) == whole
    again = load_yaml(to_yaml(tree))
    assert again == tree and build(Whole, again, NAMES) == whole
    assert dump(build(Whole, again, NAMES)) == tree
    assert digest(tree) == digest(dict(reversed(tree.items())))


def test_dump_writes_type_only_where_it_chooses() -> None:
    tree = dump(Whole(critic_updates=1, move=Right()))
    assert "type" not in tree and tree["spare"] is None
    assert tree["shape"] == {"type": "test_build:Square", "side": 1.0} or tree["shape"]["type"].endswith(":Square")
    assert tree["move"]["type"].endswith(":Right")
    assert dump(Square())["type"].endswith(":Square")  # chosen by type wherever a Shape is expected


def test_a_class_of_the_package_is_written_by_name() -> None:
    from fewstep.diffusion import PATHS, Contract, NoisePath, RectifiedFlow

    assert dump(RectifiedFlow()) == {"type": "RectifiedFlow"}
    assert build(NoisePath, {"type": "RectifiedFlow"}, {c.__name__: c for c in PATHS}) == RectifiedFlow()
    assert "type" not in dump(Contract())["guidance"]


def test_unknown_key_names_the_nearest() -> None:
    message = refusal(critic_updats=3)
    assert message.startswith(
        "recipe: critic_updats is unknown; did you mean critic_updates? (accepted: critic_updates, shape"
    )
    assert "recipe: shape.raduis is unknown; did you mean radius? (accepted: radius, hole, style)" in refusal(
        shape={"type": "Ring", "raduis": 1}
    )
    assert "did you mean critic_updates" in refusal(**{"critic-updates": 3})


def test_unknown_class_and_literal() -> None:
    assert "shape.type cannot be 'Rign'; did you mean Ring? (accepted: Square, Ring, package.module:Class)" in refusal(
        shape={"type": "Rign"}
    )
    assert "shape.type is missing; accepted: Square, Ring" in refusal(shape={"side": 1.0})
    assert "shape.type cannot be 'Optim'" in refusal(shape={"type": "Optim"})
    assert "optim.student.type cannot be 'adam'; did you mean adamw? (accepted: adamw, muon)" in refusal(
        optim={"student": {"type": "adam"}}
    )
    assert "move.type cannot be 'Up'; accepted: Left, Right" in refusal(move={"type": "Up"})


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"critic_updates": True}, "critic_updates must be a whole number, got True"),
        ({"critic_updates": 2.0}, "critic_updates must be a whole number, got 2.0"),
        ({"critic_updates": "5"}, "critic_updates must be a whole number, got '5'"),
        ({"compile": "yes"}, "compile must be true or false, got 'yes'"),
        ({"compile": 1}, "compile must be true or false, got 1"),
        ({"times": 1.0}, "times must be a list, such as [1, 2], got 1.0"),
        ({"times": [1.0, "x"]}, "times[1] must be a number, got 'x'"),
        ({"times": [1.0, True]}, "times[1] must be a number, got True"),
        ({"size": [1, 2, 3]}, "size must be a list of 2 values, got 3"),
        ({"shape": 3}, "shape must be keys and values, got 3"),
        ({"shape": None}, "shape must be keys and values, got None"),
        ({"optim": {4: {}}}, "optim has the key 4, which is not text; write '4'"),
        ({"path": 3}, "path must be a path, got 3"),
        ({"seeds": "x"}, "seeds must be a whole number or a list of a whole number, got 'x'"),
        ({"shape": {"type": "Square", "side": -1}}, "recipe: shape: side must be positive, got -1.0"),
        ({"shape": {"type": "Ring"}}, "shape.radius is missing: Ring needs it (a number)"),
    ],
)
def test_wrong_values(tree: dict[str, Any], words: str) -> None:
    assert words in refusal(**tree)


def test_missing_required_key() -> None:
    with pytest.raises(RecipeError, match=r"recipe: critic_updates is missing: Whole needs it \(a whole number\)"):
        build(Whole, {}, NAMES)


def test_import_paths() -> None:
    tree = {"type": "fewstep.diffusion.paths:RectifiedFlow"}
    from fewstep.diffusion import NoisePath, RectifiedFlow

    assert build(NoisePath, tree) == RectifiedFlow()
    assert "which is not a Shape" in refusal(shape=tree)
    with pytest.raises(RecipeError, match="cannot import 'nowhere.at_all:X': ModuleNotFoundError"):
        build(Whole, {"critic_updates": 5, "shape": {"type": "nowhere.at_all:X"}}, NAMES, At("mine.yaml", trusted=True))
    assert "which is not a class" in refusal(shape={"type": "fewstep.core.build:build"})


def test_nothing_outside_is_imported_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "outside_of_it.py").write_text("from test_build import Square\nclass Mine(Square): ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "test_build", sys.modules[__name__])
    tree = {"critic_updates": 5, "shape": {"type": "outside_of_it:Mine"}}
    with pytest.raises(RecipeError, match="shape.type is 'outside_of_it:Mine'.*--allow-imports"):
        build(Whole, tree, NAMES)
    assert "outside_of_it" not in sys.modules
    try:
        assert type(build(Whole, tree, NAMES, At("mine.yaml", trusted=True)).shape).__name__ == "Mine"
        assert type(build(Whole, tree, NAMES).shape).__name__ == "Mine"  # by now the caller has imported it
    finally:
        del sys.modules["outside_of_it"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (".evil:Foo", "package.module:Class"),
        ("fewstep.__main__:main", "package.module:Class"),
        ("fewstep.methods.base:Method", "is abstract"),
        ("fewstep.core.build:no.such", "cannot import"),
    ],
)
def test_import_paths_that_name_no_class(name: str, words: str) -> None:
    from fewstep.methods.base import Method

    with pytest.raises(RecipeError, match=words):
        build(Method, {"type": name}, {}, At("mine.yaml", trusted=True))


def test_numbers_are_finite_and_within_their_bounds() -> None:
    @dataclass(frozen=True)
    class Held:
        steps: Count = 1
        rates: dict[str, Positive] = field(default_factory=dict)
        ends: tuple[float, ...] = ()
        share: Fraction | None = None

        def __post_init__(self) -> None:
            require_bounds(self)

    hints = {"steps": Count, "rates": dict[str, Positive], "ends": tuple[float, ...], "share": Fraction | None}
    Held.__annotations__ |= hints
    good = {"steps": 10**9, "rates": {"a": 1e-9}, "ends": [0.5], "share": 1}
    assert build(Held, good) == Held(10**9, {"a": 1e-9}, (0.5,), 1.0)
    for tree, words in (
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": 10**26}, "steps must be at most 1,000,000,000, got 1000000000"),
        ({"rates": {"a": 0.0}}, "rates.a must be more than 0, got 0.0"),
        ({"rates": {"a": float("inf")}}, "rates.a must be a finite number, got inf"),
        ({"ends": [0.5, float("nan")]}, "ends[1] must be a finite number, got nan"),
        ({"share": 1.5}, "must be at most 1, got 1.5"),
    ):
        with pytest.raises(RecipeError) as caught:
            build(Held, tree)
        assert words in str(caught.value)
        with pytest.raises(ValueError) as raised:
            Held(**{key: tuple(value) if isinstance(value, list) else value for key, value in tree.items()})
        assert words in str(raised.value)
    with pytest.raises(RecipeError, match="critic_updates must be at most 9,223"):
        make(critic_updates=2**63)


@dataclass(frozen=True)
class Mistakable:
    """A field of every kind that can be mistaken."""

    loss: Literal["hinge", "softplus"] = "hinge"
    critic: Shape | Literal["real"] | None = None
    pair: tuple[Positive, ...] | None = None
    named: Mapping[str, Positive] | None = None
    anything: object = None
    steps: Count = 1
    rate: Positive = 1.0
    name: str | None = None
    losses: tuple[Literal["hinge", "softplus"], ...] = ()

    def __post_init__(self) -> None:
        require_bounds(self)


class Interface(Protocol):
    """What an object can do, whoever it is."""


@dataclass(frozen=True)
class Another:
    size: int = 1


@dataclass(frozen=True)
class Holding:
    """Fields that hold other objects."""

    kind: Shape = Square()
    perhaps: Square | None = None
    several: tuple[Shape, ...] = ()
    word: Square | Literal["own"] | None = None
    interface: Interface | None = None
    anything: Any = None

    def __post_init__(self) -> None:
        require_bounds(self)


def test_objects_are_of_the_classes_of_the_annotation() -> None:
    Holding(perhaps=Square(side=2.0), several=(Square(), Square()), word="own", interface=Another(), anything=Another())
    for given, words in (
        ({"kind": Another()}, "kind must be Shape, got Another"),
        ({"kind": None}, "kind must be Shape, got None"),
        ({"perhaps": True}, "perhaps must be Square, got True"),
        ({"several": (Square(), Another())}, "several[1] must be Shape, got Another"),
        ({"kind": 0.5}, "kind must be Shape, got 0.5"),
        ({"kind": "Square"}, "kind must be Shape, got 'Square'"),
        ({"kind": {"side": 2.0}}, "kind must be Shape, got dict"),
        ({"perhaps": len}, "perhaps must be Square, got builtin_function_or_method"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            Holding(**given)


def test_words_and_kinds_of_numbers_are_those_of_the_annotation_in_python_too() -> None:
    Mistakable(loss="softplus", critic="real", steps=2, rate=2, name="any", losses=("hinge",), pair=(0.5, 1))
    Mistakable(anything="a text", named={"a": 1})
    for given, words in (
        ({"loss": "wgan"}, "loss cannot be 'wgan'; accepted: hinge, softplus"),
        ({"critic": "student"}, "critic cannot be 'student'; accepted: real"),
        ({"pair": (0.5, 0.0)}, "pair[1] must be more than 0, got 0.0"),
        ({"named": {"a": -1}}, "named.a must be more than 0, got -1"),
        ({"losses": ("hinge", "wgan")}, "losses[1] cannot be 'wgan'; accepted: hinge, softplus"),
        ({"rate": "0.1"}, "rate must be a number, got '0.1'"),
        ({"steps": 1.5}, "steps must be a whole number, got 1.5"),
        ({"losses": "hinge"}, "losses must be a list, such as [1, 2], got 'hinge'"),
        ({"pair": 0.5}, "pair must be a list, such as [1, 2], got 0.5"),
    ):
        with pytest.raises(ValueError) as raised:
            Mistakable(**given)  # type: ignore[arg-type]
        assert words in str(raised.value)


def test_yaml_has_no_traps() -> None:
    tree = load_yaml("a: 1e-5\nb: yes\nc: 010\nd: 12:30\ne: 2024-01-01\nf: true\ng: ~\nh: -3\ni: 1.\nj: 'true'")
    assert tree == {
        "a": 1e-5, "b": "yes", "c": "010", "d": "12:30", "e": "2024-01-01",
        "f": True, "g": None, "h": -3, "i": 1.0, "j": "true",
    }  # fmt: skip
    with pytest.raises(RecipeError, match="line 3: the key 'b' is written twice"):
        load_yaml("a:\n  b: 1\n  b: 2")
    with pytest.raises(RecipeError, match="recipe, line 2"):
        load_yaml("a: [1\nb: }")
    for text, words in (
        ("? [a, b]\n: 1", "a key must be text"),
        ("[" * 3000, "nested too deeply"),
        ("a: &x [1]\nb: [*x, *x]", "aliases are not read"),
        ("a: " + "9" * 5000, "thousands of digits"),
    ):
        with pytest.raises(RecipeError, match=words):
            load_yaml(text)


@pytest.mark.parametrize(
    "tree", [{"a": "1e5"}, {"a": "true"}, {"a": "null"}, {"a": "3"}, {"a": 1e-7, "b": [1, 2.0, "x: y"]}]
)
def test_yaml_round_trip_keeps_types(tree: dict[str, Any]) -> None:
    assert load_yaml(to_yaml(tree)) == tree


def test_command_line_text_is_read_by_type() -> None:
    whole = make(
        critic_updates=Raw("7"), compile=Raw("true"), times=Raw("[1, 0]"), path=Raw("12"), text=Raw("34"),
        spare=Raw("{type: Ring, radius: 1e-2}"), seeds=Raw("[1, 2]"),
    )  # fmt: skip
    assert whole.critic_updates == 7 and whole.compile and whole.times == (1.0, 0.0)
    assert whole.path == Path("12") and whole.text == "34" and whole.seeds == (1, 2)
    assert whole.spare == Ring(radius=0.01)
    assert make(path=Raw("null")).path is None
    assert make(text=Raw("{lr: 2}")).text == Optim(lr=2.0)
    assert "must be a whole number, got 'ten'" in refusal(critic_updates=Raw("ten"))


def test_arguments_of_any_constructor() -> None:
    class Network:
        def __init__(self, *, width: int = 8, shape: Shape | None = None) -> None:
            self.width, self.shape = width, shape

    Network.__init__.__annotations__.update(width=int, shape=Shape | None)
    assert build_arguments(Network, {"width": 4, "shape": {"type": "Square"}}, NAMES) == {"width": 4, "shape": Square()}
    with pytest.raises(RecipeError, match=r"card: net.widht is unknown; did you mean width"):
        build_arguments(Network, {"widht": 4}, NAMES, At("card", "net"))


def test_digest_is_stable() -> None:
    assert digest({"b": 1, "a": [1.0, None]}) == digest({"a": [1.0, None], "b": 1})
    assert digest({"a": 1}) != digest({"a": 2}) and len(digest({})) == 12
