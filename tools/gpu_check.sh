#!/usr/bin/env bash
# What a GPU can say about this checkout, in two runs that may be stopped at any time.
set -u

usage() {
    cat >&2 <<'TEXT'
usage: tools/gpu_check.sh first|second OUT [--dry]

  first   at most 9 minutes: smoke test, compilation in parallel, a short verify, layers beside their
          peers, each kernel alone, device tests, a sweep of tiles
  second  at most 3.5 minutes, with new tiles in place: the headline cases again, a decoder layer,
          memory checks
  --dry   tiny sizes on a CPU, in Triton's interpreter: nothing is measured (or DRY=1)

OUT gets at most 8 files, written as results come: log.txt, rows as *.jsonl, the table of tiles that
the sweep found. Compiled kernels are kept in gpu_check_out/. The commit in the rows is that of git,
or of PERA_COMMIT where there is no git. Exit status: 0, 1 if a step failed, 2 for bad usage or
without a GPU. Needs torch, triton and numpy, for peers and tests peft, transformers and pytest.
TEXT
    exit 2
}

dry=${DRY:-0}
words=()
for word in "$@"; do
    case $word in
    --dry) dry=1 ;;
    -*) usage ;;
    *) words+=("$word") ;;
    esac
done
[ ${#words[@]} -eq 2 ] && [[ ${words[0]} =~ ^(first|second)$ ]] || usage
mkdir -p "${words[1]}" || exit 2
out=$(cd "${words[1]}" && pwd)
cd "$(dirname "$0")/.." || exit 2
keep=$PWD/gpu_check_out
mkdir -p "$keep"
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 TRITON_CACHE_DIR=$keep/.triton
: "${PERA_COMMIT:=$(git describe --always --dirty --abbrev=12 --exclude='*' 2>/dev/null)}"
export PERA_COMMIT
log=$out/log.txt
failed=0

# step SECONDS COMMAND...: run it within its limit; its output goes to the log.
step() {
    local limit=$1 start=$SECONDS code=0
    shift
    echo "== $* (at most $limit s)" | tee -a "$log"
    # A busy CPU may take its time: limits are for a GPU.
    [ "$dry" != 1 ] || limit=600
    timeout --kill-after=5 "$limit" "$@" >>"$log" 2>&1 || code=$?
    [ $code -eq 0 ] || failed=1
    tail -n 3 "$log" | sed 's/^/   /'
    echo "-- exit $code after $((SECONDS - start)) s" | tee -a "$log"
}

if [ "$dry" = 1 ]; then
    export TRITON_INTERPRET=1
    device=cpu
    smoke_sizes=(--ranks 3 --terms full --dtypes bfloat16 --shapes 5x16x12)
    compile=(env -u TRITON_INTERPRET python3 -m tools.compile_report --precompile --archs sm_90
        --kernels sum --shapes 64x48 --jobs 1)
    compile_sizes=(--tokens 16 --ranks 4 --terms full --dtypes bf16)
    more_sizes=("${compile_sizes[@]}")
    verify_sizes=(--ranks 3 --terms full --dtypes bfloat16 --shapes 5x16x12 --jobs 0)
    layer_sizes=(--device cpu --shapes 32x24 --rounds 2)
    layer_tokens=8 few_tokens=8 headline_tokens=8 large_tokens=8 rank=4 high_rank=5 phases=both,eval
    kernel_sizes=(--device cpu --T 16 --size 32 --rank 4 --rounds 2)
    decoder_sizes=(--device cpu --size tiny --rounds 2)
    device_tests=(tests/test_cuda.py)
    tune_sizes=(--dry --ranks 3 --candidates 1 --rounds 1)
    memory_sizes=(--shapes 5x16x12)
else
    unset TRITON_INTERPRET
    device=cuda
    smoke_sizes=(--ranks 16 --terms full --dtypes bfloat16 --shapes 300x512x384)
    compile=(python3 -m tools.compile_report --precompile)
    compile_sizes=(--tokens 16384 4096 512 64 16 1 --ranks 16 --terms full --dtypes bf16 bf16+fp32)
    more_sizes=(--kernels layer --tokens 16384 --ranks 16 32 --terms square full --dtypes bf16+fp32)
    verify_sizes=(--ranks 3 16 --terms full square --dtypes bfloat16 float32)
    layer_sizes=(--device cuda --shapes 4096x4096 --rounds 12)
    layer_tokens=16384,4096,512,64,16,1 few_tokens=16384,4096
    headline_tokens=16384,4096,512 large_tokens=16384 rank=16 high_rank=32
    phases=both,forward,eval
    kernel_sizes=(--T 16384,4096,512,16)
    decoder_sizes=(--device cuda)
    device_tests=(tests/test_cuda.py tests/test_autograd.py tests/test_dropout.py)
    tune_sizes=(--ranks 16 --candidates 24 --rounds 8)
    memory_sizes=(--shapes 33x70x50)
    if ! python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
        echo "gpu_check: no GPU: PyTorch finds no CUDA device here; --dry needs none" >&2
        exit 2
    fi
fi
parallel=()
if [ "$dry" != 1 ] && python3 -c 'import xdist' 2>/dev/null; then parallel=(-n 12); fi
bench=(python3 -m benchmarks "${layer_sizes[@]}" --dropout 0)
verify=(python3 -m pera_kernels verify --device "$device" --backend triton)

first() {
    # float32 adapters, as a layer has them unless asked otherwise, are the headline.
    local rows=$out/rows.jsonl half=bfloat16+float32
    step 25 "${verify[@]}" --ops pera_linear "${smoke_sizes[@]}" --jobs 0
    step 35 "${compile[@]}" "${compile_sizes[@]}" --budget 24
    step 20 "${compile[@]}" "${more_sizes[@]}" --budget 10
    step 35 "${verify[@]}" --ops pera_linear "${verify_sizes[@]}" --failures
    step 110 "${bench[@]}" --dtypes $half --T "$layer_tokens" --ranks $rank --terms full \
        --phases "$phases" --only merged,peft-lora-amp,released-amp,auto --budget 100 --out "$rows"
    step 30 "${bench[@]}" --dtypes bfloat16 --T "$few_tokens" --ranks $rank --terms full \
        --phases both --only peft-lora,released,auto --budget 26 --out "$rows"
    step 20 "${bench[@]}" --dtypes $half --T "$large_tokens" --ranks $rank --terms square \
        --phases both --only auto --out "$rows"
    step 20 "${bench[@]}" --dtypes $half --T "$large_tokens" --ranks $high_rank --terms full \
        --phases both --only auto --out "$rows"
    step 70 python3 -m benchmarks.kernels "${kernel_sizes[@]}" --budget 60 --out "$rows"
    step 75 python3 -m pytest -q "${parallel[@]}" -p no:cacheprovider "${device_tests[@]}"
    step 100 python3 -m tools.tune --kernels accumulate,project_expanded,contract,project \
        --classes half "${tune_sizes[@]}" --budget 90 --write --out "$out" --tables "$out"
}

second() {
    step 50 "${bench[@]}" --dtypes bfloat16+float32 --T "$headline_tokens" --ranks $rank \
        --terms full --phases both --only merged,peft-lora-amp,auto --budget 44 \
        --out "$out/rows-after.jsonl"
    step 100 python3 -m benchmarks.decoder "${decoder_sizes[@]}" --out "$out/decoder.jsonl"
    local sanitizer=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck
        --error-exitcode 9)
    if [ "$dry" = 1 ]; then
        sanitizer=(env)
    elif ! command -v compute-sanitizer >/dev/null; then
        echo "-- absent: compute-sanitizer; memory was not checked" | tee -a "$log"
        return
    fi
    step 50 "${sanitizer[@]}" "${verify[@]}" --terms full --ranks 3 --dtypes bfloat16 \
        "${memory_sizes[@]}" --jobs 0
}

"${words[0]}"
exit $failed
