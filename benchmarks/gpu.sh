#!/usr/bin/env bash
# All GPU checks and figures in one command, under 8 minutes: bash benchmarks/gpu.sh
# A part that fails or takes too long is named at the end, and the exit status is 1; the others go on. All results that
# there are, also those of parts that were cut off, lie in benchmarks/results, and in $OUT, if that is a folder.
# For a machine without internet: `bash benchmarks/gpu.sh wheels 3.12`, where there is internet, puts what is needed
# beside PyTorch for Python 3.12 into .wheels; take that folder along.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
if [ "${1:-}" = wheels ]; then
    pip download -q --no-deps --only-binary=:all: --python-version "${2:-3.12}" -d .wheels \
        fastai fastcore fasttransform plum-dispatch fastprogress fastdownload && ls .wheels
    exit
fi
[ ! -d .wheels ] || python3 -m pip install -q --no-index --no-deps --force-reinstall .wheels/*.whl || exit
export PYTHONPATH="$PWD" PYTHONWARNINGS=ignore MPLBACKEND=Agg
failed=()

part() { # name, seconds, command
    local name=$1 seconds=$2
    shift 2
    echo "== $name: $*"
    timeout "$seconds" "$@" || failed+=("$name (exit status $?)")
}

bring() { # also when interrupted
    [ -z "${OUT:-}" ] || find benchmarks/results -maxdepth 1 \( -name '*cuda*' -o -name 'gpu.*' \) -exec cp {} "$OUT" \;
}
trap bring EXIT

main() {
    part 'kernels against the eager operations' 100 python3 -m pytest -q tests/test_kernels.py -k compiled
    part 'transform, synchronisations, search'  240 python3 benchmarks/gpu.py
    part 'surcharge' 80 python3 benchmarks/surcharge.py --device cuda --models wrn-16-2 --rounds 3
    part 'growth'    50 python3 benchmarks/growth.py --device cuda --rounds 2
    for name in "${failed[@]}"; do echo "FAILED: $name"; done
    [ ${#failed[@]} = 0 ]
}
main 2>&1 | tee benchmarks/results/gpu.log
