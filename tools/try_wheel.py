"""Build the wheel, install it in an empty folder, and run a recipe from it there.

`python tools/try_wheel.py`, with the interpreter whose packages the wheel may use: nothing but fewstep itself is installed.
pip fetches the build's own tools where they are not there.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECIPE = "world/consistency"
SMALL = [
    f"--settings.{key}={value}"
    for key, value in {"steps": 2, "batch": 2, "compile": "false", "autocast": "off"}.items()
]
"""What makes the recipe a matter of seconds on any CPU."""


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        pip("wheel", ROOT, "--wheel-dir", home / "wheel")
        (wheel,) = (home / "wheel").glob("fewstep-*.whl")
        pip("install", wheel, "--target", home / "site")
        (home / "elsewhere").mkdir()
        here = python(home, "-c", "import fewstep; print(fewstep.__file__)")
        if not Path(here.strip()).is_relative_to(home.resolve()):
            raise SystemExit(f"the wheel was not tried: fewstep came from {here.strip()}")
        named = python(home, "-m", "fewstep", "list", "recipes")
        for path in (ROOT / "src" / "fewstep" / "recipes").rglob("*.yaml"):
            name = path.relative_to(ROOT / "src" / "fewstep" / "recipes").with_suffix("").as_posix()
            if name not in named.split():
                raise SystemExit(f"the wheel has no recipe {name}")
        mine = home / "elsewhere" / "mine.yaml"
        mine.write_text(python(home, "-m", "fewstep", "explain", RECIPE), encoding="utf-8")
        for recipe, output in ((RECIPE, "named"), (mine.name, "mine")):
            python(home, "-m", "fewstep", "distill", recipe, *SMALL, "--output", output, "--quiet")
        if read(home, "named") != read(home, "mine"):
            raise SystemExit(f"`fewstep explain {RECIPE} > mine.yaml` is another recipe than {RECIPE}")
        shown = ("--prompt", "a small red ring moves left", "--num-inference-steps", "1")
        python(home, "-m", "fewstep", "sample", "named/student", *shown)
        size = wheel.stat().st_size / 1e6
        print(f"{wheel.name}: {size:.1f} MB; installed elsewhere, it ran {RECIPE} by name and from a file, and sampled")
    return 0


def pip(command: str, *words: object) -> None:
    quiet = ("--quiet", "--disable-pip-version-check", "--no-deps")
    subprocess.run([sys.executable, "-m", "pip", command, *quiet, *map(str, words)], check=True)


def python(home: Path, *words: str) -> str:
    """Run Python beside the installed wheel, in a folder that knows nothing of the checkout; its output."""
    env = {**os.environ, "PYTHONPATH": str(home / "site")}
    command = [sys.executable, *words]
    done = subprocess.run(command, cwd=home / "elsewhere", env=env, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}")
    return done.stdout


def read(home: Path, run: str) -> str:
    """The recipe that a run has resolved."""
    return (home / "elsewhere" / run / "recipe.yaml").read_text(encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
