"""The work of `fewstep import`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fewstep.cli.commands import _made
from fewstep.core.atomic import new_folder
from fewstep.models.known import importing

if TYPE_CHECKING:
    from fewstep.cli.students import Import


def import_student(options: Import) -> int:
    draft = new_folder(options.output)  # refused before anything is read
    given = {name: value for name, value in vars(options).items() if name != "output"}
    student = importing.Import(**given).student()
    with draft as folder:
        student.save(folder)
    contract = student.card.contract
    times = ", ".join(f"{t:.4g}" for t in contract.times())
    print(
        f"{student.card.name}: {contract.steps} steps at times {times}; {contract.sampler}, guidance {contract.guidance.scale:g}"
    )
    if contract.stream is not None:
        chunks = ", ".join(map(str, contract.stream.chunks))
        print(f"a stream in chunks of {chunks} latent frames; fewstep stream {options.output} makes it live")
    return _made(options.output)
