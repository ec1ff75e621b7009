#!/usr/bin/env bash
# What this package does on the GPU of this machine, in at most 20 minutes and without a network:
#
#     tools/gpu_check.sh [--wheels FOLDER] [--records FILE] [--device cpu --small]
#
# --wheels FOLDER  first unpack the wheels in FOLDER beside the packages that are installed here
# --records FILE   where the records go (benchmarks/results/gpu.jsonl); what is measured is in it,
#                  whatever happens later
# --device cpu --small  tiny sizes on a CPU, to check that this script runs
#
# 1. the tests that need a GPU, and the kernels' tests compiled (6 minutes at most)
# 2. whole steps beside the trainers they replace, at three shapes and at L0 10 to 1000 (8)
# 3. steps of a cross-layer transcoder (1), the time of each kernel (2), and tokens a second with dictionaries trained (3)
# Then the tables and the figure of docs/results.md are drawn from the records.
#
# A part that fails or runs out of time does not stop the others; the exit status is 1 if one did.
set -uo pipefail
cd "$(dirname "$0")/.."

wheels="" records=benchmarks/results/gpu.jsonl device=cuda small=""
while [ $# -gt 0 ]; do
    case $1 in
        --wheels) wheels=$2; shift 2 ;;
        --records) records=$2; shift 2 ;;
        --device) device=$2; shift 2 ;;
        --small) small=--small; shift ;;
        *) echo "gpu_check.sh: unknown option $1; see the head of this file" >&2; exit 2 ;;
    esac
done

export HF_HUB_OFFLINE=1 WANDB_MODE=disabled TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
if [ -n "$wheels" ]; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    python3 -m pip install --quiet --no-index --no-deps --target "$site" "$wheels"/*.whl || exit 2
    export PYTHONPATH=$site:$PYTHONPATH
fi
# Without a GPU the steps of the kernels are those of Triton's interpreter.
[ "$device" = cpu ] && export TRITON_INTERPRET=1
python3 -c "
import torch, triton
assert '$device' == 'cpu' or torch.cuda.is_available(), 'there is no CUDA device here'
print(torch.__version__, 'triton', triton.__version__, '$device')" || exit 2

failed=0
part() {  # part NAME SECONDS COMMAND...
    local name=$1 seconds=$2
    shift 2
    echo "== $name"
    timeout "$seconds" "$@" || { echo "gpu_check.sh: $name failed or ran out of time"; failed=1; }
}

if [ -z "$small" ]; then
    part "tests on the GPU" 200 python3 -m pytest -q -p no:cacheprovider \
        --continue-on-collection-errors -m gpu tests
    part "the kernels' tests, compiled" 190 python3 -m pytest -q -p no:cacheprovider \
        -m "gpu or not gpu" --deselect tests/step/kernels/test_compiled.py tests/step/kernels \
        tests/transcoders/clt/test_training_step.py
fi
bench=(python3 -m benchmarks.gpu)
options=(--device "$device" --output "$records" $small)
part "steps" 450 "${bench[@]}" steps "${options[@]}" --minutes 6
part "a cross-layer transcoder" 80 "${bench[@]}" clt "${options[@]}" --minutes 1
part "kernels" 130 "${bench[@]}" profile "${options[@]}" --minutes 1.5
part "harvest" 160 "${bench[@]}" harvest "${options[@]}" --minutes 2
[ -n "$small" ] || part "tables" 40 python3 -m benchmarks.gpu_report --records "$records"
exit $failed
