"""Block Cascading (2511.20426): a student that makes one chunk after the other begins one before the last is finished."""

from __future__ import annotations

from dataclasses import replace

from fewstep.diffusion import Contract


def cascaded(contract: Contract, after: int, steps: int | None = None) -> Contract:
    """The contract of a stream whose chunks start when the one before has made `after` of its `steps` (default: its own).

    No training is needed: a chunk reads those before it, finished or not. With all steps it is the same stream, bit for bit.
    ValueError for a contract without a stream, for one whose stream rolls or has steps by chunk, and where `after` does not
    divide the steps.
    """
    stream, count = contract.stream, steps or contract.steps
    if stream is None or stream.rolling or stream.steps:
        raise ValueError(
            "only a stream of one number of steps, whose chunks are made one after the other, can be cascaded; "
            + (
                "this model makes whole clips"
                if stream is None
                else f"got rolling={stream.rolling}, steps={stream.steps}"
            )
        )
    if after < 1 or count % after:
        fitting = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
        raise ValueError(f"a chunk can start after {fitting} of {count} steps of the one before, not after {after}")
    return (
        contract if after == count else replace(contract, stream=replace(stream, rolling=count // after, mutual=False))
    )
