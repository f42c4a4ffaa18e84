#!/usr/bin/env bash
# Everything a GPU can say about this checkout, in under nine minutes: tools/gpu_check.sh OUT
# Needs torch, triton, numpy and pytest; the package need not be installed. Each part is bounded in
# time and reports on its own, so that one that fails or hangs does not silence the others.
set -u
if [ $# -ne 1 ]; then
    echo "usage: tools/gpu_check.sh OUT" >&2
    exit 2
fi
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit 2
export PYTHONPATH="$PWD" PYTHONUNBUFFERED=1 TRITON_CACHE_DIR="$out/.triton"
unset TRITON_INTERPRET
failed=0
summary=()

part() { # part NAME SECONDS COMMAND...
    local name=$1 limit=$2 start=$SECONDS code=0
    shift 2
    echo "== $name"
    timeout --kill-after=10 "$limit" "$@" >"$out/$name.txt" 2>&1 || code=$?
    tail -n 3 "$out/$name.txt"
    case $code in
    0) summary+=("ok      $name ($((SECONDS - start)) s)") ;;
    124 | 137) summary+=("TIMEOUT $name after $limit s, see $name.txt") failed=1 ;;
    *) summary+=("FAILED  $name (exit $code), see $name.txt") failed=1 ;;
    esac
}

part environment 30 python3 - <<'PY'
import platform, sys
import numpy, torch, triton
print("python", platform.python_version(), "torch", torch.__version__, "triton", triton.__version__,
      "numpy", numpy.__version__)
if not torch.cuda.is_available():
    sys.exit("no CUDA device")
p = torch.cuda.get_device_properties(0)
print(p.name, f"sm_{p.major}{p.minor}", p.multi_processor_count, "multiprocessors",
      p.total_memory >> 20, "MiB")
PY
part tests 140 python3 -m pytest -q tests/test_cuda.py tests/test_autograd.py tests/test_dropout.py \
    tests/test_numerics.py -k "not test_torch_backend" -p no:cacheprovider
part verify 130 python3 -m tools.verify --device cuda --json "$out/verify.json"
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        part "sanitizer-$tool" 35 compute-sanitizer --tool "$tool" --error-exitcode 9 \
            python3 -m tools.verify --device cuda --backend triton --terms full --ranks 3 \
            --dtypes bfloat16 --shapes 33x70x50
    done
else
    summary+=("absent  compute-sanitizer: memcheck and racecheck not run")
fi
part benchmarks 110 python3 -m benchmarks --device cuda --out "$out/benchmarks.jsonl"
rm -rf "$out/.triton"

echo
echo "== summary"
cat "$out/environment.txt"
printf '%s\n' "${summary[@]}" | tee "$out/summary.txt"
exit $failed
