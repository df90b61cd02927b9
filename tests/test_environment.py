"""What is installed: few things, and the torch that was chosen."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
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
    assert importlib.util.find_spec("torchvision") is None, "something has installed torchvision, which nothing needs"


def test_torch_is_in_the_declared_range() -> None:
    wanted = next(d for d in PROJECT["dependencies"] if re.match(r"torch\b", d))
    low, high = (tuple(map(int, v.split("."))) for v in re.findall(r"\d+\.\d+", wanted))
    assert low <= tuple(map(int, torch.__version__.split("+")[0].split(".")[:2])) < high


def replacement(installed: str, version: str, cuda: str | None, packages: set[str]) -> str:
    """How the torch of an environment differs from the one `installed` first; empty if it does not."""
    if version != installed:
        return f"torch {installed} was installed first, and now there is {version}"
    if "+cpu" not in installed:
        return ""
    extra = sorted(name for name in packages if name.startswith("nvidia-"))
    return f"the CPU build of torch has CUDA {cuda} {', '.join(extra)}" if cuda is not None or extra else ""


def test_the_torch_that_was_installed_was_not_replaced() -> None:
    """`make` writes down which torch it installed before anything else: the CPU build, where one was asked for."""
    record = Path(sys.prefix) / ".torch"
    if not record.is_file() or not record.read_text().strip():
        pytest.skip("this environment was not made by the Makefile, so what was installed first is not known")
    packages = {(d.name or "").lower() for d in importlib.metadata.distributions()}
    assert replacement(record.read_text().strip(), torch.__version__, torch.version.cuda, packages) == ""


def test_a_replaced_torch_is_noticed() -> None:
    assert replacement("2.13.0+cpu", "2.13.0+cpu", None, {"torch"}) == ""
    assert replacement("2.13.0+cu130", "2.13.0+cu130", "13.0", {"torch", "nvidia-nccl"}) == ""
    assert "now there is 2.13.0+cu130" in replacement("2.13.0+cpu", "2.13.0+cu130", "13.0", {"torch"})
    assert "nvidia-nccl" in replacement("2.13.0+cpu", "2.13.0+cpu", None, {"torch", "nvidia-nccl"})


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_another_index_for_torch_is_refused_once_there_is_an_environment(tmp_path: Path) -> None:
    def make(*words: str) -> subprocess.CompletedProcess[str]:
        command = ["make", "-n", "-f", str(ROOT / "Makefile"), *words]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    (tmp_path / "pyproject.toml").touch()
    assert "--index-url https://one" in make("test", "TORCH_INDEX=https://one").stdout
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / ".made").touch()
    (tmp_path / ".venv" / ".torch").write_text("2.13.0+cpu\n")
    (tmp_path / ".venv" / ".index").write_text("https://one\n")
    assert make("test", "TORCH_INDEX=https://one").returncode == 0
    assert make("test").returncode == 0
    refused = make("test", "TORCH_INDEX=https://two")
    assert refused.returncode != 0 and 'run "make clean" first' in refused.stderr
    assert make("clean", "TORCH_INDEX=https://two").returncode == 0


def test_core_dependencies_stay_few() -> None:
    names = {re.split(r"[<>=!~\[ ;]", d)[0].lower() for d in PROJECT["dependencies"]}
    assert len(names) <= 8 and not names & HEAVY


def test_version_is_written_once_more_only() -> None:
    import fewstep

    assert fewstep.__version__ == PROJECT["version"]
