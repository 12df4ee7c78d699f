#!/usr/bin/env bash
# What only a GPU can show, the most important first: bash tools/gpu_check.sh | tee docs/results/gpu.md
# Ends after BUDGET seconds (default 450) and names what is left out. SHARED_DATA (default ../shared/data)
# may hold the image packs; without them random images stand in.
# Where no package can be installed, bring them along before:
#   pip install --target .gpu_packages --no-deps --only-binary :all: --python-version 3.12 yacs termcolor simplejpeg
set -uo pipefail
exec 2>&1 # a traceback belongs to the results
cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1 # else what a command printed is lost when its time is up
if [ -d .gpu_packages ]; then export PYTHONPATH=$PWD/.gpu_packages${PYTHONPATH:+:$PYTHONPATH}; fi
python=${PYTHON:-python3}
for package in torch torchvision timm yacs termcolor simplejpeg pytest; do
  if ! "$python" -c "import $package"; then
    echo "error: $package is missing; $python -m pip install -r requirements-dev.txt"
    exit 2
  fi
done
packs=${SHARED_DATA:-../shared/data}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
status=0
run() {
  local limit=${LIMIT:-120} left=$((${BUDGET:-450} - SECONDS))
  echo
  echo "## $*"
  if ((left < 10)); then
    echo "LEFT OUT: no time"
    status=1
    return
  fi
  timeout $((left < limit ? left : limit)) "$@" || { echo "FAILED ($?): $*"; status=1; }
}
bench() { run "$python" -m benchmarks --device cuda "$@"; }

echo "commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown), $(date -u +%F)"
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
"$python" -c "import torch, torchvision, timm; print('torch', torch.__version__, 'torchvision', torchvision.__version__, 'timm', timm.__version__)"
LIMIT=150 run "$python" -m pytest tests/gpu tests/data/test_device_decode.py -p no:cacheprovider
bench --rounds 20 augment --batch 256
bench --rounds 20 loss
bench --rounds 10 step
bench --rounds 5 epoch --batch 512 --steps 20 --symmetric
images=$(ls "$packs"/imagenette*.tar* "$packs"/imagenette*.zip 2>/dev/null | head -1)
folder=
if [ -n "$images" ]; then
  case $images in *.zip) unzip -q "$images" -d "$work" ;; *) tar -xf "$images" -C "$work" ;; esac
  folder=$(dirname "$(find "$work" -type d -name train | head -1)")
  LIMIT=180 bench --rounds 2 throughput --data "$folder" --workers 16
  bench --rounds 3 epoch --data "$folder" --batch 256 --queue 65536 --steps 10 --workers 16
else
  echo "no image pack in $packs: random images, and no epoch on real JPEGs"
  LIMIT=180 bench --rounds 2 throughput
fi
if "$python" -c "import lightly" 2>/dev/null; then
  bench --rounds 5 peers --backbone resnet50 --size 224 --batch 128 --workers 16
else
  echo "lightly is not installed: the comparison with it is left out"
fi
bench --rounds 5 epoch --batch 512 --steps 20 --symmetric --backend fused
bench --rounds 5 epoch --batch 32 --steps 50 --compile graphs
bench --rounds 5 epoch --batch 32 --steps 50
if [ -n "$folder" ]; then
  bench --rounds 3 epoch --data "$folder" --batch 256 --queue 65536 --steps 10 --workers 4 --decode device --backend fused
fi
bench --rounds 20 corruption
bench --rounds 20 loss --batch 32
bench --rounds 20 augment --batch 256 --recipe byol
exit $status
