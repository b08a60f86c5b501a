#!/usr/bin/env bash
# All GPU checks and figures in one command, under 8 minutes: bash benchmarks/gpu.sh
# For a machine without internet: `bash benchmarks/gpu.sh wheels 3.12`, where there is internet, puts what is needed beside PyTorch for Python 3.12 into .wheels; take that folder along.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "${1:-}" = wheels ]; then
    pip download -q --no-deps --only-binary=:all: --python-version "${2:-3.12}" -d .wheels fastai fastcore fasttransform plum-dispatch fastprogress fastdownload && ls .wheels; exit
fi
[ ! -d .wheels ] || python3 -m pip install -q --no-index --no-deps --force-reinstall .wheels/*.whl
export PYTHONPATH="$PWD" PYTHONWARNINGS=ignore MPLBACKEND=Agg
timeout 100 python3 -m pytest -q tests/test_kernels.py -k compiled || echo 'THE KERNELS DO NOT AGREE WITH THE EAGER OPERATIONS'
timeout 220 python3 benchmarks/gpu.py
timeout 80  python3 benchmarks/surcharge.py --device cuda --models wrn-16-2 --rounds 3
timeout 50  python3 benchmarks/growth.py --device cuda --rounds 2
if [ -n "${OUT:-}" ]; then cp benchmarks/results/*cuda* benchmarks/results/gpu.* "$OUT"; fi
