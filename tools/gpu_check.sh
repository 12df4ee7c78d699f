#!/usr/bin/env bash
# All that only a GPU can show, in under ten minutes: bash tools/gpu_check.sh | tee docs/results/gpu.md
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
status=0
run() { echo; echo "## $*"; "$@" || { echo "FAILED: $*"; status=1; }; }

echo "commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown), $(date -u +%F)"
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
"$python" -c "import torch, torchvision, timm; print('torch', torch.__version__, 'torchvision', torchvision.__version__, 'timm', timm.__version__)"
run "$python" -m pytest tests/gpu tests/parity tests/models -p no:cacheprovider
run "$python" tools/benchmark.py --device cuda --rounds 20 loss
run "$python" tools/benchmark.py --device cuda --rounds 20 loss --batch 32
run "$python" tools/benchmark.py --device cuda --rounds 20 corruption
exit $status
