#!/usr/bin/env bash
# Everything that needs a CUDA GPU, in at most 8 minutes: first the tests, then the benchmarks in order of importance.
#   bash benchmarks/gpu.sh [folder for the results, default benchmarks/results]
# PYTHON names the interpreter (default: python). Every step has its own time limit; what it printed is kept. The exit code
# is 0 only if all steps passed.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
folder=${1:-benchmarks/results}
"$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())" || {
    echo "error: torch finds no CUDA GPU on this machine: run it on one that has a GPU and torch's CUDA build" >&2
    exit 2
}
mkdir -p "$folder"
gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | tr ' /' '--' | tr '[:upper:]' '[:lower:]')
result=$folder/gpu_${gpu}_$(date +%F).txt
failed=0
began=$(mktemp)

step() { # step SECONDS COMMAND...
    echo "\$ ${*:2}" | tee -a "$result"
    timeout -s INT -k 10 "$1" "${@:2}" 2>&1 | tee -a "$result"
    [ "${PIPESTATUS[0]}" -eq 0 ] || { failed=1; echo "failed or out of time ($1 s)" | tee -a "$result"; }
}

has() { # has MODULE
    "$python" -c "import $1" 2>/dev/null
}

{
    date --iso-8601=seconds
    git log -1 --format='commit %h' 2>/dev/null
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
    "$python" -c "import timm, torch, sys; print('torch', torch.__version__, 'CUDA', torch.version.cuda, 'timm', timm.__version__, 'Python', sys.version.split()[0])"
} | tee "$result"

step 40 "$python" -m vmrnn.selfcheck
# The tests spend most of their time in the compiler, so they run in several processes if pytest-xdist is installed.
# shellcheck disable=SC2046  # several words, or none
step 110 "$python" -m pytest -q -rs -m gpu $(has xdist && echo "-n 8")
# The kernels for all batch sizes are compiled side by side into Triton's cache, where the timed runs find them.
for batch in 1 8 16 64; do
    timeout 45 "$python" -m benchmarks.scan --device cuda --rounds 1 --batches $batch >/dev/null 2>&1 &
done
wait
step 60 "$python" -m benchmarks.scan --device cuda --rounds 1
published=$("$python" -c "from vmrnn.scan import mamba; print('D:16:bf16:mamba D:16:mamba' if mamba.can_run('cuda', None, 16)[0] else '')")
# shellcheck disable=SC2086  # several words, or none
step 195 "$python" -m benchmarks.train_step --device cuda --rounds 1 --cases D:16:bf16:triton D:16:bf16:triton:graph \
    $published D:1:bf16:triton:graph D:16:triton D:16:bf16:torch D:16:bf16:triton:checkpoint B:16:bf16:triton:graph \
    D:64:bf16:triton:graph B:1:bf16:triton:graph B:64:bf16:triton:graph \
    D:16:bf16:triton:graph:muon D:16:bf16:triton:compile
step 30 "$python" -m benchmarks.layers --device cuda
# The figures as JSON, of the benchmarks that ended
for name in scan train_step layers; do
    [ "exps/benchmarks/$name.jsonl" -nt "$began" ] && tail -n 1 "exps/benchmarks/$name.jsonl" >>"$result"
done
rm "$began"
echo "results: $result"
exit $failed
