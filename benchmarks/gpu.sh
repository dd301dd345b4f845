#!/usr/bin/env bash
# Everything that needs a CUDA GPU, in at most 8 minutes: the tests, then both benchmarks.
#   bash benchmarks/gpu.sh [folder for the results, default benchmarks/results]
# PYTHON names the interpreter (default: python). Each part has its own time limit and leaves what it
# had printed; the exit code is 0 only if all of them passed.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
folder=${1:-benchmarks/results}
mkdir -p "$folder"
gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | tr ' /' '--' | tr '[:upper:]' '[:lower:]')
result=$folder/gpu_${gpu}_$(date +%F).txt
failed=0

part() { # part SECONDS COMMAND...
    echo "\$ ${*:2}" | tee -a "$result"
    timeout "$1" "${@:2}" 2>&1 | tee -a "$result"
    [ "${PIPESTATUS[0]}" -eq 0 ] || { failed=1; echo "failed or out of time ($1 s)" | tee -a "$result"; }
}

{
    date --iso-8601=seconds
    git log -1 --format='commit %h' 2>/dev/null
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
    "$python" -c "import timm, torch, sys; print('torch', torch.__version__, 'CUDA', torch.version.cuda, 'timm', timm.__version__, 'Python', sys.version.split()[0])"
} | tee "$result"
part 110 "$python" -m pytest -q -rs tests/test_scan.py tests/test_networks.py tests/test_scan_triton.py \
    tests/test_fused_layers.py tests/test_training.py tests/test_predict.py::test_a_stream_on_a_graph_is_the_same_stream
part 80 "$python" -m benchmarks.scan --device cuda --rounds 1
part 30 "$python" -m benchmarks.layers --device cuda
published=$("$python" -c "from vmrnn.scan import mamba; print('D:16:bf16:mamba D:16:mamba' if mamba.can_run('cuda', None, 16)[0] else '')")
# shellcheck disable=SC2086  # several words, or none
part 250 "$python" -m benchmarks.train_step --device cuda --rounds 1 --cases D:16:bf16:triton D:16:bf16:triton:graph \
    $published D:16:bf16:torch D:16:triton D:16:bf16:triton:graph:muon D:16:bf16:triton:checkpoint D:16:bf16:triton:compile D:1:bf16:triton:graph \
    D:8:bf16:triton:graph D:64:bf16:triton:graph B:1:bf16:triton:graph B:8:bf16:triton:graph B:16:bf16:triton:graph \
    B:64:bf16:triton:graph
echo "results: $result"
exit $failed
