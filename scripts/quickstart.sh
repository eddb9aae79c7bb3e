#!/usr/bin/env bash
# One super-resolution network becomes five nested ones, on real photographs, through BasicSR's own training program:
# environment, data, forward stage, backward stage, test, a table and a plot. Steps that are already done are skipped.
set -euo pipefail
cd "$(dirname "$0")/.."
# For glibc, see KEEP_FREED_MEMORY in study.py.
export MALLOC_TOP_PAD_=100000000 MALLOC_TRIM_THRESHOLD_=1000000000 MALLOC_MMAP_THRESHOLD_=33554432
# The options' num_gpu: auto takes all GPUs that it sees, which needs torchrun if these are several.
CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-0}
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES%%,*}

step() { echo; echo "=== $(date +%T) $* (after $((SECONDS / 60)) min $((SECONDS % 60)) s)"; }

step "Environment"
. scripts/environment.sh plot

step "Data"
python scripts/quickstart_data.py

# The options ask for bf16, which is slower than fp32 where the processor has no arithmetic for it.
force=
python - << 'END' || force="--force_yml train:precision=fp32"
import sys
import torch
from mssr_basicsr.models.precision import lacks_bf16
sys.exit(lacks_bf16(torch.device('cuda' if torch.cuda.is_available() else 'cpu')))
END

for stage in forward backward; do
    step "The $stage stage: options/mssr_$stage.yml"
    resume=--auto_resume
    # A backward stage that began before the forward stage was repeated is not resumed: BasicSR puts it aside.
    if [ "$stage" = backward ] &&
        [ experiments/mssr_forward/models/net_g_latest.pth -nt experiments/mssr_backward/mssr_backward.yml ]; then
        resume=
    fi
    if [ -n "$resume" ] && [ -e "experiments/mssr_$stage/models/net_g_latest.pth" ]; then
        echo "Already done; to repeat it, remove experiments/mssr_$stage."
    else
        python -m mssr_basicsr.train -opt "options/mssr_$stage.yml" $resume $force
    fi
done

step "Test: options/mssr_test.yml"
if [ results/mssr_test/levels.json -nt experiments/mssr_backward/models/net_g_latest.pth ]; then
    echo "Already done; to repeat it, remove results/mssr_test."
else
    python -m mssr_basicsr.test -opt options/mssr_test.yml
fi

step "Result"
python scripts/quickstart_report.py
step "Done"
