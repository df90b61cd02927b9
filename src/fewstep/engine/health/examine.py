"""One health check during a run: figures to the log, the record to disk, the best student to its folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fewstep.engine.health.monitor import Monitor, judge_of, unexamined
from fewstep.engine.health.record import FILE
from fewstep.engine.health.vitals import figures, unsaid
from fewstep.engine.log import RunLog

if TYPE_CHECKING:
    from fewstep.engine.run import Run


def announce(run: Run, log: RunLog) -> None:
    """Print once what will be checked and what may follow, or why there are no checks. Deletes the record of an earlier
    start."""
    if run.processes.leads:
        (run.output / FILE).unlink(missing_ok=True)
    if run.monitor is None:
        log.say(f"no health checks: {unexamined(run.model, run.method, run.settings)}")
        return
    health = run.monitor.health
    policies = {
        "keeps the best student": health.keep_best and run.probe is None,
        "stops on collapse": health.stop_on_collapse,
        "gives the critic more updates when it lags": health.help_critic > 0 and run.method.critic is not None,
    }
    active = ", ".join(name for name, on in policies.items() if on) or "changes nothing"
    log.say(
        f"health: a check every {health.every} iterations on {health.prompts} prompts x {health.seeds} seeds; {active}"
    )


def examine(run: Run, monitor: Monitor, log: RunLog) -> None:
    """Check the student, act on the verdict, and write it to `health.json`, with a picture in `health/`."""
    run.nets.bring(*sorted(run.nets.keys() & {"teacher", judge_of(run.method), run.method.critic}))
    check = monitor.check(run.student(), run.step)
    run.figures |= {f"health/{name}": value for name, value in figures(check.vitals).items()}
    log.say(f"step {run.step}: {check.verdict}" + "".join(f"; {what}" for what in (*check.done, *unsaid(check.vitals))))
    if run.probe is None and monitor.note_best(check):
        run.keep(run.output / "best")
    if run.probe is None and monitor.returns_best and (monitor.stopped or run.step == run.settings.steps):
        log.say(f"the run returns its best student, from step {monitor.best[0] if monitor.best else run.step}")
    log.picture(monitor.draw(), run.output / "health" / f"{run.step:06d}.png")
    if run.processes.leads:
        monitor.record.save(run.output)
