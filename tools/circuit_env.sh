#!/usr/bin/env bash
# An environment with this package and the tools it exports to, and a run of the tests that need
# them:
#
#     tools/circuit_env.sh [FOLDER]      # a virtual environment, .venv-circuits if not given
#
# The tools declare older versions of transformers, huggingface_hub and others than this package
# uses, and work with the newer ones; so they are installed without their dependencies, and those
# they import come from the extra `circuits`. pip therefore reports conflicts, which are expected.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-.venv-circuits}

[ -x "$folder/bin/python" ] || python3 -m venv "$folder"
"$folder/bin/python" -m pip install --quiet -c constraints.txt -e ".[dev,circuits]"
"$folder/bin/python" -m pip install --quiet --no-deps -r tools/circuit_tools.txt
HF_HUB_OFFLINE=1 WANDB_MODE=disabled "$folder/bin/python" -m pytest -n 2 \
    tests/formats tests/circuits tests/transcoders/clt tests/test_examples.py \
    -k "not test_example_runs or 10_circuit or 16_clt"
