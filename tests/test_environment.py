"""What is installed: few things, and the torch that was chosen."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import sys
import tomllib
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
HEAVY = {
    "torchvision",
    "torchaudio",
    "diffusers",
    "transformers",
    "xformers",
    "triton",
    "scipy",
    "opencv-python",
    "flash-attn",
}


def test_torchvision_is_not_needed() -> None:
    """No file imports it, so a torchvision that does not match torch can break nothing."""
    importing = [
        p for p in (ROOT / "src").rglob("*.py") if re.search(r"^\s*(?:import|from) torchvision", p.read_text(), re.M)
    ]
    assert importing == []
    assert importlib.util.find_spec("torchvision") is None or "torchvision" not in sys.modules


def test_torch_is_in_the_declared_range() -> None:
    wanted = next(d for d in PROJECT["dependencies"] if re.match(r"torch\b", d))
    low, high = (tuple(map(int, v.split("."))) for v in re.findall(r"\d+\.\d+", wanted))
    assert low <= tuple(map(int, torch.__version__.split("+")[0].split(".")[:2])) < high


def test_the_cpu_build_of_torch_was_not_replaced() -> None:
    """Where there is no CUDA device, installing the project must leave the small CPU build in place."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    if "+cpu" not in importlib.metadata.version("torch") and sys.platform != "darwin":
        pytest.skip("torch was installed from an index without CPU builds")
    assert torch.version.cuda is None
    assert not [d.name for d in importlib.metadata.distributions() if (d.name or "").startswith("nvidia-")]


def test_core_dependencies_stay_few() -> None:
    names = {re.split(r"[<>=!~\[ ;]", d)[0].lower() for d in PROJECT["dependencies"]}
    assert len(names) <= 8 and not names & HEAVY


def test_version_is_written_once_more_only() -> None:
    import fewstep

    assert fewstep.__version__ == PROJECT["version"]
