"""The leaderboard: equal budgets, what is run again, verdicts on claims, and a run from end to end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fewstep import demo, leaderboard
from fewstep.core.lock import FolderInUse, holding
from fewstep.data.pairs import PairPlan, PairsMade, make_pairs
from fewstep.engine.probe import WorldProbe
from fewstep.evaluate import Suite
from fewstep.evaluate.cases import SEED_STRIDE
from fewstep.leaderboard import DEMO, Contestant, Run, contestants, lengthened, work
from fewstep.leaderboard.budget import BLOCKS, CLIP, share
from fewstep.leaderboard.claims import CLAIMS, Claim, Verdict, judge
from fewstep.leaderboard.results import COUNTS, TEACHER, load_result
from fewstep.leaderboard.runs import APART, COST, LARGEST, PAIR_STEPS, PAIRED, SEEDS, SUITE
from fewstep.leaderboard.stages import stages_of
from fewstep.leaderboard.switches import SWITCHES, TERMS
from fewstep.leaderboard.table import ahead, budget_section, gains, rule, said
from fewstep.methods import METHODS, Progressive
from fewstep.methods.work import Work
from fewstep.models.bundle import VideoModel
from fewstep.pipeline import Pipeline
from fewstep.world.grammar import parse, world_prompts
from support_leaderboard import RECIPE, figures, result

TEACHERS = result(TEACHER, {50: figures(0.9), 1: figures(0.1)}, budget=0.0)


def test_the_unit_is_a_forward_pass_of_the_teacher_on_a_whole_clip() -> None:
    teacher = VideoModel.from_pretrained("world")
    assert (teacher.card.num_frames, len(teacher.denoiser.backbone.blocks)) == (CLIP, BLOCKS)
    assert share(Work("student", 3), frames=16) == 3
    assert share(Work("critic", 3, frames=4), frames=16) == 0.75
    assert share(Work("critic", 3, frames=32), frames=16) == 3, "it reads the whole clip, not more"
    assert share(Work("teacher", 2, layers=(0, 1)), frames=16, blocks=8) == 0.5
    assert share(Work("teacher", 2, layers=(0, -1)), frames=16, blocks=8) == 2


def test_the_demo_spends_the_demos_budget() -> None:
    # one critic turn of (2/3 + 1 calls of a rollout, 3 of the critic), one student turn, guided below t = 0.9
    rollout = (1 + 1.5 + 2.5) / 3
    iteration = 4 * (rollout + rollout + 2 + 2 + 3 + 1)
    assert work(demo.RECIPE) == pytest.approx(790 * iteration)
    assert DEMO - iteration < work(demo.RECIPE) <= DEMO
    accumulated = replace(demo.RECIPE, settings=replace(demo.RECIPE.settings, accumulate=3))
    assert work(accumulated) == 3 * work(demo.RECIPE)


@pytest.mark.parametrize("name", contestants())
def test_every_row_spends_its_budget_and_no_more(name: str) -> None:
    one = contestants()[name]
    for budget in (DEMO / 2, 10 * DEMO):
        made = one.prepared(budget, seed=3)
        stages = list(made.stages.values()) if isinstance(made, Pipeline) else [made]
        step = max(work(replace(one.stages[i], settings=replace(s.settings, steps=1))) for i, s in enumerate(stages))
        assert budget - len(stages) * step * 1.01 <= work(made) <= budget
        assert all(stage.settings.seed == 3 for stage in stages)
        assert stages[-1].probe is not None
        assert -(-stages[-1].settings.steps // stages[-1].probe.every) == 4


def test_the_header_of_every_row_has_its_own_command() -> None:
    for one in contestants().values():
        if not one.changes:
            assert f"\n# fewstep leaderboard {one.name}\n" in one.path.read_text(encoding="utf-8"), one.path


def test_every_row_has_a_method_of_the_package_and_serves_a_row_of_the_table() -> None:
    for one in contestants().values():
        assert all(type(stage.method) in METHODS for stage in one.stages)
        made = one.prepared(DEMO, 0)
        last = list(made.stages.values())[-1] if isinstance(made, Pipeline) else made
        teacher = one.stages[0].model.card().contract  # type: ignore[union-attr]
        assert set(last.method.contract(teacher).counts) & {1, 2, 4}
        last.method.check(last.settings.steps)


def test_the_probe_has_other_prompts_and_scenes_than_the_figures() -> None:
    own = world_prompts(SUITE.prompts, SUITE.paraphrased, SUITE.seed)
    for one in contestants().values():
        probe = stages_of(one.prepared(DEMO, 0))[-1].probe
        assert probe is not None and probe.seed != SUITE.seed
        assert not set(own) & set(probe._texts)
        assert not {parse(text) for text in own} & set(probe._scenes)


def test_no_two_runs_have_the_same_pairs_and_none_has_the_noise_of_the_figures() -> None:
    most = LARGEST * DEMO * PAIRED / PAIR_STEPS
    assert most < APART, "the pairs of one run end before those of the next seed begin"
    assert SUITE.seed * SEED_STRIDE > SEEDS * APART + 500
    assert {500 + APART * seed for seed in range(SEEDS)}.isdisjoint({SUITE.seed, WorldProbe().seed})


@pytest.mark.parametrize("budget", [float("inf"), float("nan"), 0.0, -1.0, 1001.0])
def test_a_budget_out_of_range_is_refused(budget: float) -> None:
    with pytest.raises(ValueError, match="above 0 and at most 1000"):
        Run(contestants()["dmd2"], budget)


@pytest.mark.parametrize("seed", [-1, 1000])
def test_a_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match="from 0 to 999"):
        Run(contestants()["dmd2"], seed=seed)


def test_two_budgets_have_two_files() -> None:
    one = contestants()["dmd2"]
    assert Run(one, 1.0).file == "dmd2-1-0.json"
    assert Run(one, 0.0004).file == "dmd2-0.0004-0.json"
    assert Run(one, 1.0000001).file == "dmd2-1.0000001-0.json", "six digits would be those of 1"


def test_stages_within_a_method_grow_with_the_run() -> None:
    method = Progressive(stages=((4, 10), (2, 20)))
    assert method.lengthened(2.5).stages == ((4, 25), (2, 50))
    assert method.lengthened(0.01).stages == ((4, 1), (2, 1))


def test_a_budget_that_pays_for_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(RECIPE)
    with pytest.raises(ValueError, match="less than one iteration of Consistency"):
        lengthened(Contestant("small", tmp_path / "small.yaml").recipe, 1.0)


def test_a_run_is_done_until_its_recipe_or_code_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE)
    run = Run(Contestant("small", path))
    assert not run.done(tmp_path)
    replace(result("small", {1: figures(0.5)}), code=run.contestant.code).save(tmp_path)
    assert run.done(tmp_path)
    assert not Run(run.contestant, seed=1).done(tmp_path)
    assert not Run(run.contestant, budget=10.0).done(tmp_path)
    path.write_text(RECIPE.replace("A test", "Another comment"))
    assert Run(Contestant("small", path)).done(tmp_path)
    path.write_text(RECIPE.replace("decay: 0.5", "decay: 0.6"))
    assert not Run(Contestant("small", path)).done(tmp_path)


def test_code_is_the_method_with_what_it_holds_but_not_its_prose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fewstep.leaderboard import contest

    one = contestants()["dmd2"]
    before, read = one.code, Path.read_text

    def changed(file: str, old: str, new: str) -> str:
        def patched(path: Path, *args: object, **options: str) -> str:
            text = read(path, *args, **options)  # type: ignore[arg-type]
            if path.name == file:
                assert old in text
                text = text.replace(old, new)
            return text

        with monkeypatch.context() as patch:
            patch.setattr(contest.Path, "read_text", patched)
            return one.code

    assert changed("dmd2.py", "Distribution matching distillation (DMD, DMD2)", "Something else") == before
    assert changed("dmd2.py", "warmup=self.warmup", "warmup=self.warmup + 1") != before
    assert changed("turns.py", "step >= warmup", "step > warmup") != before
    assert changed("targets.py", "gap = (fake - real)", "gap = (real - fake)") != before
    assert changed("backward_simulation.py", "grad", "grads") != before


@pytest.mark.parametrize(
    ("better", "worse", "outcome"),
    [(0.8, 0.5, "confirmed"), (0.5, 0.8, "contradicted"), (0.62, 0.6, "not told apart")],
)
def test_a_claim_is_judged_only_if_intervals_do_not_touch(better: float, worse: float, outcome: str) -> None:
    claim = Claim(cite="", text="", better="a", worse="b", steps=2)
    rows = [result("a", {2: figures(better)}), result("b", {2: figures(worse)})]
    assert judge(claim, rows, figures(0.9)).outcome == outcome
    near = replace(claim, figure="frechet")  # a smaller distance is better
    rows = [result("a", {2: figures(0.5, 2 - better)}), result("b", {2: figures(0.5, 2 - worse)})]
    assert judge(near, rows, figures(0.9)).outcome == outcome
    assert judge(claim, rows[:1], figures(0.9)).outcome == "not measured"


def test_with_several_seeds_every_pair_of_seeds_must_agree() -> None:
    claim = Claim(cite="", text="", better="a", worse="b", steps=2)
    rows = [result("a", {2: figures(0.8)}), result("a", {2: figures(0.55)}, seed=1), result("b", {2: figures(0.5)})]
    assert judge(claim, rows, figures(0.9)).outcome == "not told apart"


def test_a_row_falls_where_its_interval_is_wholly_below_the_stored_one() -> None:
    stored = result("a", {4: figures(0.8), 2: figures(0.7, 2.0), 1: figures(0.3)})
    same = result("a", {4: figures(0.72), 2: figures(0.75, 2.3), 1: figures(0.5)})
    assert leaderboard.fallen(stored, same, TEACHERS) == [], "within the intervals, or better"
    worse = result("a", {4: figures(0.6), 2: figures(0.7, 3.0)})
    assert leaderboard.fallen(stored, worse, TEACHERS) == [
        "not served in 1 step any more", "accuracy in 4 steps: 0.60, was 0.80", "frechet in 2 steps: 3.00, was 2.00",
    ]  # fmt: skip
    still = result("a", {4: figures(0.8), 2: replace(figures(0.7), motion=0.03), 1: figures(0.3)})
    assert leaderboard.fallen(stored, still, TEACHERS) == ["motion in 2 steps: 0.60, was 1.00"]
    restless = result("a", {4: figures(0.8), 2: replace(figures(0.7), motion=0.08), 1: figures(0.3)})
    assert leaderboard.fallen(stored, restless, TEACHERS) == ["motion in 2 steps: 1.60, was 1.00"]
    assert leaderboard.fallen(restless, stored, TEACHERS) == [], "nearer to the teacher's"


def test_motion_is_judged_by_its_distance_to_the_teachers() -> None:
    claim = Claim(cite="", text="", better="a", worse="b", steps=2, figure="motion")

    def outcome(a: float, b: float) -> Verdict:
        rows = [result(name, {2: replace(figures(0.5), motion=m)}) for name, m in (("a", a), ("b", b))]
        return judge(claim, rows, figures(0.9))

    assert outcome(0.05, 0.08).outcome == "confirmed", "more motion than the teacher's is no merit"
    assert outcome(0.05, 0.02).outcome == "confirmed"
    assert outcome(0.08, 0.05).outcome == "contradicted"
    assert outcome(0.03, 0.05 * 5 / 3).outcome == "not told apart", "equally far"
    assert outcome(0.05, 0.0).outcome == "confirmed", "a clip that stands still"
    assert (outcome(0.05, 0.1).better, outcome(0.05, 0.1).worse) == (1, 2)


def test_a_distance_without_interval_is_not_judged() -> None:
    claim = Claim(cite="", text="", better="a", worse="b", steps=2, figure="frechet")
    rows = [result("a", {2: figures(0.5, 1.0)}), result("b", {2: replace(figures(0.5, 4.0), frechet_ci=None)})]
    assert judge(claim, rows, figures(0.9)).outcome == "not measured"
    assert judge(replace(claim, figure="accuracy"), rows, figures(0.9)).outcome == "not told apart"


def test_a_verdict_says_what_it_compares() -> None:
    rows = {1: figures(0.5), 4: figures(0.5)}
    made = [result("phased_dmd", rows), result("dmd2", rows), result("dmd2", rows, seed=1)]
    lines = said(made, replace(figures(0.9), motion=0.1))
    assert any(line.endswith("motion at 4 steps, phased_dmd 0.50 (1 seed), dmd2 0.50 (2 seeds).") for line in lines)


def test_claims_name_rows_that_serve_their_number_of_steps() -> None:
    known = contestants()
    for claim in CLAIMS:
        for name in (claim.better, claim.worse):
            assert name in known, f"no recipe leaderboard/{name} for the claim: {claim.text}"
            first, *_, last = (stages := known[name].stages)[0], stages[-1]
            counts = last.method.contract(first.model.card().contract).counts  # type: ignore[union-attr]
            assert claim.steps in set(counts) & set(COUNTS), f"{name} has no figures that could judge: {claim.text}"


def test_the_row_that_is_ahead_at_each_number_of_steps_is_named() -> None:
    """By the mean of its seeds; a number of steps that no row serves has no line."""
    rows = [
        result("lucky", {4: figures(0.3)}),
        result("lucky", {4: figures(0.9)}, seed=1),
        result("steady+small", {4: figures(0.64)}),
        result("one", {1: figures(0.4)}),
    ]
    four, one = (line for line in ahead(rows, figures(0.8)) if line.startswith("- "))
    assert four.startswith("- 4 steps: **steady+small**, ") and "80 % of the teacher's accuracy, 1.0 times" in four
    assert "and 100 % of its diversity" in four
    assert one.startswith("- 1 step") and "**one**" in one and "50 % of the teacher's" in one and one.endswith("1 seed")


def test_rows_are_sorted_by_the_rule_and_seeds_show_their_spread() -> None:
    teacher = result("teacher", {50: figures(0.9)}, budget=0.0)
    rows = [
        result("low", {4: figures(0.5), 2: figures(0.5), 1: figures(0.5)}),
        result("one", {1: figures(0.9)}),
        result("high", {4: figures(0.9), 2: figures(0.8), 1: figures(0.6)}),
        result("high", {4: figures(0.7), 2: figures(0.8), 1: figures(0.6)}, seed=1),
    ]
    lines = [line for line in budget_section(1.0, rows, teacher.most).splitlines() if line.startswith("| ")]
    assert [line.split()[1] for line in lines[2:]] == ["high", "low", "one"]
    assert "0.80 [0.70, 0.90] / 2.00 [2.00, 2.00]" in lines[2]
    assert rule(rows, "low") == pytest.approx(0.5 - 0.1 * 0.6931, abs=1e-3)


@pytest.mark.usefixtures("single_thread")
def test_a_run_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "compile_problem", lambda: "compiling takes longer than this test")
    monkeypatch.setattr("fewstep.leaderboard.contest.WorldProbe", lambda **options: None)
    (tmp_path / "small.yaml").write_text(RECIPE.replace("type: Consistency", "type: Consistency, shift: 3.0"))
    one = Contestant("small", tmp_path / "small.yaml")
    suite = Suite(prompts=2, seeds_per_prompt=2, batch=4, latency_runs=1, latency_budget=0.0)
    results, runs = tmp_path / "results", tmp_path / "runs"
    made = leaderboard.run(Run(one, budget=0.0004), results, runs, suite=suite, quiet=True)
    assert (made.iterations, made.spent) == (
        int(0.0004 * DEMO / work(one.recipe) * 10),
        work(lengthened(one.recipe, 0.0004 * DEMO)),
    )
    assert set(made.rows) == {1, 2, 4}
    assert load_result(results / made.file) == made
    again = leaderboard.run(Run(one, budget=0.0004), results, runs, suite=suite, quiet=True)
    assert (again.seconds, again.memory_mb) == (made.seconds, made.memory_mb), "those of training, which was complete"
    place = runs / "small-0.0004-0" / one.code
    (place / "run" / COST).unlink()  # as after a stop at the last iteration, when 1000 seconds had passed
    (place / "run" / "metrics.jsonl").write_text('{"step": 1, "time": 1000.0}\n')
    assert leaderboard.run(Run(one, budget=0.0004), results, runs, suite=suite, quiet=True).seconds > 1000
    with holding(place), pytest.raises(FolderInUse):
        leaderboard.run(Run(one, budget=0.0004), results, runs, suite=suite, quiet=True)
    teacher = replace(result("teacher", {n: figures(0.5) for n in (50, 4, 2, 1)}), budget=0.0)
    table = leaderboard.write_table([teacher, made], tmp_path / "table.md").read_text(encoding="utf-8")
    assert "## 0.0004 times the demo's budget" in table
    assert "| small |" in table
    assert "Not run yet: add, apt" in table
    assert "changed since: small." in table, "no such recipe is shipped"


@pytest.mark.usefixtures("single_thread")
def test_pairs_are_made_within_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "compile_problem", lambda: "compiling takes longer than this test")
    monkeypatch.setattr("fewstep.leaderboard.contest.WorldProbe", lambda **options: None)
    (tmp_path / "paired.yaml").write_text("""# A test.
model: {type: Pretrained, source: world}
method: {type: KnowledgeDistillation, rollout: {type: FromPairs, grids: [[1.0]], mode: ode}}
data: {type: StoredPairs, path: nowhere}
settings: {steps: 10, batch: 2}
""")
    one = Contestant("paired", tmp_path / "paired.yaml")
    suite = Suite(prompts=2, seeds_per_prompt=2, batch=4, latency_runs=1, latency_budget=0.0)
    budget = 200 / DEMO  # a hundred forward passes for two pairs of 20 guided steps, a hundred for 16 iterations of 6
    seen = list[tuple[int, tuple[str, ...]]]()

    def pairs(model: VideoModel, prompts: tuple[str, ...], output: Path, plan: PairPlan, *, batch: int) -> PairsMade:
        seen.append((plan.seed, prompts))
        return make_pairs(model, prompts, output, plan, batch=batch)

    monkeypatch.setattr("fewstep.leaderboard.runs.make_pairs", pairs)
    this = Run(one, budget=budget, seed=2)
    made = leaderboard.run(this, tmp_path / "results", tmp_path / "runs", suite=suite, quiet=True)
    assert seen == [(2_000_000, world_prompts(2, 0.5, 2_000_500))]
    assert (made.iterations, made.spent) == (16, 2 * 40 + 16 * 6)
    assert set(made.rows) == {1}


def test_switches_are_rows_of_their_own_that_change_one_thing() -> None:
    known = contestants()
    switched = [one for one in known.values() if "+" in one.name]
    assert len(switched) == sum(len(each) for each in SWITCHES.values()) >= 10
    for one in switched:
        base = known[one.name.partition("+")[0]]
        changed = {each.key for each in base.recipe.diff(one.recipe)}
        assert changed == {key.replace("-", "_") for key, _ in one.changes} and one.code != base.code
    rows = {4: figures(0.8), 2: figures(0.7), 1: figures(0.5)}
    made = [result("dmd2", rows), result("dmd2+ema_off", rows), result("tdm", rows)]
    text = budget_section(1.0, made, figures(0.9))
    above, below = text.split("### dmd2, one change at a time")
    assert "| tdm |" in above and "dmd2+ema_off" not in above
    assert below.index("| dmd2 |") < below.index("| dmd2+ema_off |") and "| tdm |" not in below


def test_a_change_is_told_by_what_it_adds_to_runs_of_its_seeds() -> None:
    base = [result("dmd2", {4: figures(0.5), 1: figures(0.2)}), result("dmd2", {4: figures(0.9)}, seed=1)]
    changed = result("dmd2+r1", {4: figures(0.8, 2.0), 2: figures(0.7)})
    alone = result("dmd2+r1", {4: figures(0.1)}, seed=7)
    *_, line, _ = gains("dmd2", {"dmd2+ema_off": "ema_off", "dmd2+r1": "r1"}, [*base, changed, alone])
    assert line == "| r1 | **+0.30 [0.23, 0.37]** / +0.00 [-0.28, 0.28] |  |  |"
    assert gains("gdd", {"dmd2+r1": "r1"}, [changed]) == []
    few = [result(name, {4: replace(figures(0.5), frechet_ci=None)}) for name in ("dmd2", "dmd2+r1")]
    assert gains("dmd2", {"dmd2+r1": "r1"}, few)[-2] == "| r1 | +0.00 [-0.07, 0.07] |  |  |"


def test_rows_that_are_a_base_with_one_term_more_are_told_as_changes_of_it() -> None:
    known = contestants()
    for base, terms in TERMS.items():
        for name in terms:
            one, other = (known[row].recipe for row in (base, name))
            changed = {
                key.split(".")[1]
                for each in one.diff(other)
                if not (key := each.key).startswith(("data.", "settings.optim."))
            }
            assert changed - {"steps"} <= {"anchor", "anchor_rollout"} or len(changed - {"steps"}) == 1, name
    rows = {4: figures(0.8), 2: figures(0.7), 1: figures(0.5)}
    made = [result("dmd2", rows), result("dmd2+ema_off", rows), result("dmd2_gan", {4: figures(0.5)})]
    _, below = budget_section(1.0, made, figures(0.9)).split("What each change adds to dmd2")
    assert "| discriminator, weight 0.03 | **-0.30 [-0.37, -0.23]** / +0.00 [-0.28, 0.28] |  |  |" in below


def test_a_table_without_the_teacher_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="fewstep leaderboard teacher"):
        leaderboard.write_table([result("a", {1: figures(0.5)})], tmp_path / "t.md")


def test_the_page_has_the_stored_figures(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    made = leaderboard.write_table(leaderboard.load_results(root / "bench" / "leaderboard"), tmp_path / "t.md")
    page, again = (
        [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith(("|", "- "))]
        for path in (root / "docs" / "leaderboard.md", made)
    )
    assert page == again, "the figures have changed: run fewstep leaderboard --show"
