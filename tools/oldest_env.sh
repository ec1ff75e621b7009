#!/usr/bin/env bash
# The oldest supported SAELens and TransformerLens, and the tests that hold this package to them:
#
#     tools/oldest_env.sh [FOLDER]      # a virtual environment, .venv-oldest if not given
#
# Everything else comes from the environment of the `python` that is first on the path, which has to
# have this package's `dev` extra: only the two packages of tools/oldest.txt are installed beside it.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-.venv-oldest}

[ -x "$folder/bin/python" ] || python -m venv --without-pip "$folder"
site=$("$folder/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
# An editable install of this package is a .pth file of that environment, which a second .pth does
# not read: the checkout comes from PYTHONPATH.
python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > "$site/newest.pth"
python -m pip --python "$folder/bin/python" install --quiet --no-deps -r tools/oldest.txt
HF_HUB_OFFLINE=1 WANDB_MODE=disabled PYTHONPATH=$PWD "$folder/bin/python" -m pytest \
    -p no:cacheprovider tests/contract tests/test_saelens_contract.py tests/test_registration.py \
    tests/training/test_hook_sites.py tests/saes/test_save_load.py tests/formats/test_round_trips.py
