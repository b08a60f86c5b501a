#!/usr/bin/env bash
# Does the installed package work with another Python and other releases?
#     benchmarks/versions.sh PYTHON [REQUIREMENT ...]     # such as `benchmarks/versions.sh python3.10 torch==2.4.1 torchvision==0.19.1`
# A new environment gets the package; the tests run against that, not against this folder. What was seen stands in results/versions.md.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd); tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
python=$1; shift
"$python" -m venv "$tmp/env"; . "$tmp/env/bin/activate"
pip install -q "$root" pytest pytest-xdist hypothesis accelerate timm "$@"
git clone -q "$root" "$tmp/src"; rm -rf "$tmp/src/hba_fastai"; cd "$tmp/src"; unset PYTHONPATH
python -c "import sys,torch,fastai,numpy,hba_fastai; print(sys.version.split()[0], torch.__version__, fastai.__version__, numpy.__version__, hba_fastai.__file__)"
MPLBACKEND=Agg OMP_NUM_THREADS=1 pytest -q $(printf 'tests/test_%s.py ' schedule search one_fit outside policy letter train formats plan hyper)
