"""SERVE.md of a folder for another engine: the command, the noise levels, and what was and was not checked."""

from __future__ import annotations

from fewstep.models.adapters.export.engines.plan import Plan
from fewstep.models.adapters.export.engines.student import Student

PAGE = "SERVE.md"


def page(engine: str, student: Student, plan: Plan) -> str:
    """Markdown."""
    card, others = student.card, [n for n in student.card.contract.counts if n != student.card.contract.steps]
    rows = [f"| {ours:.6g} | {theirs:.6g} |" for ours, theirs in zip(student.times, plan.visited)]
    apart = max(abs(ours - theirs) for ours, theirs in zip(student.times, plan.visited))
    notes = list(plan.notes)
    if others:
        notes.append(
            f"This folder is for {card.contract.steps} steps; {card.name} was also trained for {_listed(others)}. Export it "
            "again with another number in its contract for those."
        )
    return "\n".join(
        [
            f"# {student.title} with {engine}",
            "",
            "```sh",
            plan.command,
            plan.request,
            "```",
            "",
            "| noise level trained for | noise level that the engine visits |",
            "| --- | --- |",
            *rows,
            "",
            f"They differ by at most {apart:.1g}.",
            "",
            *(f"- {note}" for note in notes),
            "",
            "## Checked when this folder was written",
            "",
            "- The engine is known to run this family, with this sampler, without guidance, at these noise levels.",
            "- The second column of the table is the engine's own formula, with the files and flags above.",
            "- The weights are the student's, number by number, under the names that the engine reads.",
            "",
            "## Not checked",
            "",
            f"- {engine} itself did not run this folder. Compare its clips with those of `fewstep sample` before you rely on it.",
            "- Numbers of the engine are rounded (bfloat16), and it draws other noise for the same seed.",
            "- Other versions of the engine than these, which were read:",
            *(f"    - {source}" for source in plan.sources),
            "",
        ]
    )


def _listed(counts: list[int]) -> str:
    return " and ".join(map(str, counts))
