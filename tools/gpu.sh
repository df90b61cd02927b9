#!/bin/sh
# Everything that waits for a GPU (bench/gpu.py), with the Python that is there: no environment is made.
cd "$(dirname "$0")/.." && PYTHONPATH=src exec "${PYTHON:-python3}" bench/gpu.py "$@"
