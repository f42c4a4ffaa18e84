#!/usr/bin/env bash
# Everything a GPU can say about this checkout, in parts of less than nine minutes each.
# Needs torch, triton, numpy and pytest, for some contenders peft and transformers; the package need
# not be installed.
set -u

usage() {
    cat >&2 <<'TEXT'
usage: tools/gpu_check.sh PART OUT [--again]

  check   environment, tests, every op against float64, compute-sanitizer where it is installed
                                                                      -> OUT/promises.jsonl
  bench   every contender, every kernel alone, host time of a call    -> OUT/rows.jsonl
  layer   training step of a decoder layer                            -> OUT/decoder.jsonl
  tune    tiles for this GPU                                          -> OUT/tune-*.jsonl, OUT/sm_*.json
  all     these, in this order

What a part prints goes to OUT/PART.txt. A part that passed is skipped when it is asked for again,
unless with --again; one that was cut short goes on where it stopped. Compiled kernels are kept in
OUT/.triton. Exit status: 0, 1 if anything failed, 2 for bad usage or without a GPU.
TEXT
    exit 2
}

again=no
words=()
for word in "$@"; do
    case $word in
    --again) again=yes ;;
    -*) usage ;;
    *) words+=("$word") ;;
    esac
done
[ ${#words[@]} -eq 2 ] || usage
case ${words[0]} in
check | bench | layer | tune) parts=("${words[0]}") ;;
all) parts=(check bench layer tune) ;;
*) usage ;;
esac
mkdir -p "${words[1]}" || exit 2
out=$(cd "${words[1]}" && pwd)
cd "$(dirname "$0")/.." || exit 2
export PYTHONPATH="$PWD" PYTHONUNBUFFERED=1 TRITON_CACHE_DIR="$out/.triton"
unset TRITON_INTERPRET

if ! python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu_check: no GPU: PyTorch finds no CUDA device here" >&2
    exit 2
fi

# A part never takes longer than this, whatever the limits of its steps add up to.
part_seconds=530
failed=0
summary=()

# step NAME SECONDS COMMAND...: run it within its limit and what is left of the part.
step() {
    local name=$1 limit=$2 start=$SECONDS code=0 left
    shift 2
    left=$((part_seconds - (SECONDS - part_start)))
    [ "$limit" -le "$left" ] || limit=$left
    if [ "$limit" -lt 5 ]; then
        note "NOT RUN $name: no time left in this part"
        part_failed=1
        return
    fi
    echo "== $name" | tee -a "$log"
    timeout --kill-after=5 "$limit" "$@" >>"$log" 2>&1 || code=$?
    tail -n 2 "$log"
    case $code in
    0) note "ok      $name ($((SECONDS - start)) s)" ;;
    124 | 137) note "TIMEOUT $name after $limit s, see $part.txt" && part_failed=1 ;;
    *) note "FAILED  $name (exit $code), see $part.txt" && part_failed=1 ;;
    esac
}

note() {
    summary+=("$1")
    echo "$1" >>"$log"
}

environment='
import platform, numpy, torch, triton
print("python", platform.python_version(), "torch", torch.__version__, "triton",
      triton.__version__, "numpy", numpy.__version__)
p = torch.cuda.get_device_properties(0)
print(p.name, f"sm_{p.major}{p.minor}", p.multi_processor_count, "multiprocessors",
      p.total_memory >> 20, "MiB")
'

check() {
    step environment 30 python3 -c "$environment"
    step tests 130 python3 -m pytest -q tests/test_cuda.py tests/test_autograd.py \
        tests/test_dropout.py tests/test_numerics.py -k "not test_torch_backend" \
        -p no:cacheprovider
    step verify 160 python3 -m tools.verify --device cuda
    step guarded 60 python3 -m pytest -q tests/test_guarded_memory.py tests/test_determinism.py \
        tests/test_faults.py -k "cuda or gpu or streams or graph" -p no:cacheprovider \
        --record "$out/promises.jsonl"
    if ! command -v compute-sanitizer >/dev/null; then
        note "absent  compute-sanitizer: memcheck, racecheck, initcheck not run"
        return
    fi
    local tool
    for tool in memcheck racecheck initcheck; do
        step "$tool" 45 compute-sanitizer --tool "$tool" --error-exitcode 9 \
            python3 -m tools.verify --device cuda --backend triton --terms full --ranks 3 \
            --dtypes bfloat16 --shapes 33x70x50 --jobs 0
    done
}

bench() {
    step precompile 70 python3 -m tools.tune.precompile --for layers,kernels --budget 60
    step kernels 60 python3 -m benchmarks.kernels --budget 40 --resume --out "$out/rows.jsonl"
    step host 40 python3 -m benchmarks.host --device cuda --out "$out/rows.jsonl"
    step benchmarks 380 python3 -m benchmarks --device cuda --preset gpu --budget 340 --resume \
        --out "$out/rows.jsonl"
}

layer() {
    step precompile 60 python3 -m tools.tune.precompile --for decoder --budget 50
    step decoder 260 python3 -m benchmarks.decoder --device cuda --out "$out/decoder.jsonl"
    step checkpointing 200 python3 -m benchmarks.decoder --device cuda --checkpointing \
        --out "$out/decoder.jsonl"
}

tune() {
    step tune 480 python3 -m tools.tune --budget 440 --resume --write --out "$out" --tables "$out"
}

for part in "${parts[@]}"; do
    marker=$out/.done-$part log=$out/$part.txt part_start=$SECONDS part_failed=0
    if [ -e "$marker" ] && [ $again = no ]; then
        summary+=("done    $part before; --again runs it again")
        continue
    fi
    rm -f "$marker"
    echo "==== $part, $(date -u +%FT%TZ)" | tee -a "$log"
    "$part"
    if [ $part_failed -eq 0 ]; then touch "$marker"; else failed=1; fi
done

echo
echo "==== summary"
printf '%s\n' "${summary[@]}"
exit $failed
