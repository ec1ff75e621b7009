#!/usr/bin/env bash
# An environment with this package, the tools it exports to and those that evaluate its SAEs
# (SAEBench, sae-probes), and a run of the tests that need them:
#
#     tools/circuit_env.sh [FOLDER]      # a virtual environment, .venv-circuits if not given
#
# The tools declare older versions of transformers, huggingface_hub and others than this package
# uses, and work with the newer ones; so they are installed without their dependencies, and those
# they import come from the extras `circuits` and `saebench`. pip therefore reports conflicts, which
# are expected.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-.venv-circuits}

[ -x "$folder/bin/python" ] || python3 -m venv "$folder"
"$folder/bin/python" -m pip install --quiet -c constraints.txt -e ".[dev,circuits,saebench]"
"$folder/bin/python" -m pip install --quiet --no-deps -r tools/circuit_tools.txt
HF_HUB_OFFLINE=1 WANDB_MODE=disabled "$folder/bin/python" -m pytest -n 2 \
    tests/formats tests/circuits tests/transcoders/clt tests/evaluation/test_saebench.py \
    tests/evaluation/test_sae_probes.py tests/test_examples.py \
    -k "not test_example_runs or 10_circuit or 16_clt or 20_saebench or 21_sae_probes"
