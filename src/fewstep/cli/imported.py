"""The work of `fewstep import`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fewstep.cli.command import UsageError
from fewstep.core.atomic import replacing_folder
from fewstep.models.known import importing

if TYPE_CHECKING:
    from fewstep.cli.students import Import


def import_student(options: Import) -> int:
    if options.output.exists() and (not options.output.is_dir() or any(options.output.iterdir())):
        raise UsageError(f"--output {options.output} is not empty; give another folder, or delete it")
    given = {name: value for name, value in vars(options).items() if name != "output"}
    student = importing.Import(**given).student()
    with replacing_folder(options.output) as draft:
        student.save(draft)
    contract = student.card.contract
    times = ", ".join(f"{t:.4g}" for t in contract.times())
    print(
        f"{student.card.name}: {contract.steps} steps at times {times}; {contract.sampler}, guidance {contract.guidance.scale:g}"
    )
    print(options.output)
    return 0
