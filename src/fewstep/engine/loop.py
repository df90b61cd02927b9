"""The training loop: one fixed order for every method.

draw a batch -> freeze and unfreeze -> backward, loss by loss -> clip -> check that numbers are finite -> step -> (after all
updates) average, probe, picture, log, checkpoint. The same function distils a student and trains a teacher from scratch,
with one process or many: all processes run the same code, and only the leader writes files that exist once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from fewstep.core.finite import require_finite
from fewstep.core.stopping import Request, Terminated, on_request, saying
from fewstep.data.base import Data, require
from fewstep.engine.checkpoint import Checkpoint, Saver, checkpoints
from fewstep.engine.effective import WATCHED
from fewstep.engine.health.examine import announce, examine
from fewstep.engine.log import RunLog
from fewstep.engine.prepare import prepare
from fewstep.engine.probe import Probe
from fewstep.engine.result import finish, result_from
from fewstep.engine.run import Run
from fewstep.engine.settings import Settings
from fewstep.engine.space import require_disk
from fewstep.methods.base import Method
from fewstep.models import VideoModel


def train(
    model: VideoModel, method: Method, data: Data, settings: Settings, output: Path | str, **options: Any
) -> VideoModel:
    """Train the method's student and return it: `complete`, whose `options` these are, and its result from the disk. The same
    call resumes a run that was killed. With several processes, only the leader gets the denoiser's weights, in main memory.
    """
    return result_from(complete(model, method, data, settings, output, **options), settings.device)


def complete(
    model: VideoModel,
    method: Method,
    data: Data,
    settings: Settings,
    output: Path | str,
    *,
    probe: Probe | None = None,
    provenance: dict[str, str] | None = None,
    quiet: bool = False,
) -> Path:
    """Train the method's student and return the folder that it was written to.

    Under `torchrun` every process calls it with the same arguments, and `output` is on a file system that all of them see.
    Writes to `output`: `metrics.jsonl`, `tensorboard/`, `previews/`, `checkpoints/`, `health.json`, `health/`,
    `effective.json`, `best/`, and the result: `student/`, `teacher/` or the trained part (`result_of`). With a probe, the
    result is the best one by the probe's rule. Otherwise it is the last one, or the best so far if the last one fails
    its health check (`settings.health`). `model` becomes the frozen teacher. SIGTERM saves a
    checkpoint after the current iteration and raises Terminated. Raises ValueError if a setting cannot take effect,
    NonFiniteError if a number is not finite, CheckpointError if `output` belongs to another run, OSError if the disk is too
    small.
    """
    output = Path(output)
    require(data, method)
    data.check(model)
    with saying(lambda: kept(output, settings)), on_request() as stop:
        run = prepare(model, method, data, settings, output, probe=probe, provenance=provenance or {})
        require_disk(run)
        iterate(run, stop, quiet=quiet)
        return finish(run)


def iterate(run: Run, stop: Request, *, quiet: bool) -> None:
    """Train from the last checkpoint to the end. If a stop is requested, save a checkpoint and raise Terminated."""
    settings, output = run.settings, run.output
    found = run.processes.from_leader(checkpoints(output / "checkpoints")[-1:])
    if found:
        run.restore(Checkpoint.open(found[-1]))
    with (
        RunLog(output, resume_step=run.step, total=settings.steps, quiet=quiet, leads=run.processes.leads) as log,
        Saver(output / "checkpoints", settings.keep_last, run.processes.disk) as saver,
    ):
        if found:
            log.say(f"resumed from {found[-1].name}")
        else:
            announce(run, log)
        publish(run, log, run.effective.lines())
        watched = min(run.step + WATCHED, settings.steps)
        while not run.over:
            run.iterate()
            if run.watch is not None and run.step == watched:
                run.effective, run.watch = run.effective.with_seen(run.watch), None
                publish(run, log, run.effective.seen())
            after(run, log, saver)
            if run.processes.mean({"stop": float(stop.made)})["stop"] and not run.over:  # all processes decide the same
                saver.save(run.state())
                saver.wait()
                run.processes.barrier()  # the leader has given the checkpoint its name
                raise Terminated(kept(output, settings))


def kept(output: Path, settings: Settings) -> str:
    """What happens if the user starts a stopped run again."""
    if found := checkpoints(output / "checkpoints"):
        return f"the same command resumes from {found[-1].name}"
    every = f"the first comes after {settings.save_every} steps" if settings.save_every else "settings.save_every is 0"
    return f"there is no checkpoint yet ({every}), so the same command starts from the beginning"


def publish(run: Run, log: RunLog, facts: list[str]) -> None:
    """Print the most important of what is in effect, and write all of it to the run's folder."""
    for fact in facts:
        log.say(fact)
    if run.processes.leads:
        run.effective.save(run.output)


def after(run: Run, log: RunLog, saver: Saver) -> None:
    """Do the health check, the probe, the picture, the log row and the checkpoint, if one of them is due."""
    step, settings = run.step, run.settings
    examined = run.monitor is not None and run.monitor.due(step)
    if run.monitor is not None and examined:
        examine(run, run.monitor, log)
    last = run.over
    probed = run.probe is not None and (last or step % run.probe.every == 0)
    if run.probe is not None and probed:
        judge(run, run.probe, log)
    if run.preview is not None and (last or step % settings.preview_every == 0):
        run.nets.bring("teacher", "student")
        picture = run.preview.draw(run.student())
        log.picture(picture, run.output / "previews" / f"{step:06d}.png")
    if probed or examined or last or step % settings.log_every == 0:
        log.write(step, run.figures)
    log.advance(step, " ".join(f"{k[5:]} {v:.3g}" for k, v in run.figures.items() if k.startswith("loss/")))
    if last or (settings.save_every and step % settings.save_every == 0):
        state = run.state()
        for name, tensors in state.components.items():
            for key, tensor in tensors.items():
                require_finite(
                    tensor.to_local() if isinstance(tensor, DTensor) else tensor, f"step {step}, {key} of {name}"
                )
        saver.save(state)


def judge(run: Run, probe: Probe, log: RunLog) -> None:
    """Probe the student, and keep it as the best so far if it is better by the probe's rule."""
    scores = run.processes.from_leader(probe(run.student()))  # all processes sample; the leader's scores count
    for name, score in scores.items():
        require_finite(torch.tensor(score), f"step {run.step}, probe figure {name} of student")
    run.figures |= {f"probe/{name}": score for name, score in scores.items()}
    if probe.better(scores, run.best):
        run.best = scores
        run.keep(run.output / "best")
        log.say(f"step {run.step}: best so far, " + ", ".join(f"{name} {score:.3f}" for name, score in scores.items()))
