#!/usr/bin/env bash
# Check and measure this tree on one GPU within a time budget.
#
#   benchmarks/gpu_acceptance.sh [FOLDER] [SECONDS]      (default: benchmarks/results/acceptance, 480)
#
# Needs a Python ($PYTHON, default python3) with torch, triton, pytest and the dependencies of
# sid_fast except platformdirs; installs and downloads nothing. The most valuable parts run first,
# each within a share of the remaining time: the default backend, then the Triton kernels, then unit
# tests and the rest. Triton kernels compile in the background meanwhile. Results are written row by
# row; SIGTERM and Ctrl-C end the run with its summary. $SID_FAST_COMMIT names the commit of a tree
# without git history. Without a GPU a rehearsal runs every part with tiny inputs.
set -u

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=${1:-$root/benchmarks/results/acceptance}
seconds=${2:-480}
python=${PYTHON:-python3}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
log=$out/acceptance.log
: >"$log"
exec > >(trap '' INT TERM && exec tee -a "$log") 2>&1

# shellcheck source=benchmarks/layout.sh
. "$root/benchmarks/layout.sh"
cd "$site" || exit 2

export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/sid_fast-triton}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-${TMPDIR:-/tmp}/sid_fast-inductor}
export SID_FAST_COMMIT=${SID_FAST_COMMIT:-$(git -C "$root" describe --always --dirty 2>/dev/null)}
export SID_FAST_SHARED=${SID_FAST_SHARED:-$([ -d "$root/shared" ] && echo "$root/shared" || echo "$root/../shared")}
PATH=$PATH:/usr/local/cuda/bin

summary=()
running=
warming=
finish() {
    [[ $warming ]] && kill "$warming" 2>/dev/null
    echo
    printf '%s\n' "${summary[@]}"
    "$python" -m benchmarks.report --results "$out" --out "$out/README.md"
}
cut_off() {
    trap '' INT TERM
    [[ $running ]] && kill "$running" && wait "$running"
    summary+=("cut off after $SECONDS s")
    finish
    exit 143
}
trap cut_off INT TERM

# part NAME SHARE COMMAND…: run a command within SHARE percent of the remaining time. BUDGET in the
# command becomes three quarters of those seconds, so that it can stop by itself.
part() {
    local name=$1 share=$2 start=$SECONDS budget status
    shift 2
    budget=$(((seconds - SECONDS) * share / 100))
    if ((budget < 10)); then
        summary+=("$name: no time left")
        return
    fi
    echo
    echo "== $name, at most $budget s"
    # In the background, so that bash handles signals at once.
    timeout --signal=INT --kill-after=30 "$budget" "${@//BUDGET/$((budget * 3 / 4))}" </dev/null &
    running=$!
    wait "$running" 2>/dev/null # hides the message that a job was killed
    status=$?
    running=
    case $status in
        0) status=done ;;
        124 | 137) status="out of time, results so far kept" ;;
        *) status="exit status $status" ;;
    esac
    summary+=("$name: $status after $((SECONDS - start)) s")
}

"$python" - <<'END' || exit 2
import torch, triton
gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU: rehearsal"
print(f"torch {torch.__version__}, triton {triton.__version__}, {gpu}")
END
gpu=$("$python" -c 'import torch; print(int(torch.cuda.is_available()))')
echo "commit ${SID_FAST_COMMIT:-unknown}, $seconds s, results in $out"

build() {
    local compiler=()
    command -v nvcc >/dev/null && compiler=(-DCMAKE_CUDA_COMPILER="$(command -v nvcc)")
    cmake -S "$root" -B "$site/build" "${compiler[@]}" -Wno-dev >"$site/cmake.log" 2>&1 &&
        cmake --build "$site/build" >>"$site/cmake.log" 2>&1 &&
        cp "$site"/build/libsid_fast_kernels.* "$site/sid_fast/kernels/" ||
        { tail -n 5 "$site/cmake.log"; return 1; }
    grep 'sid_fast:' "$site/cmake.log"
}
if command -v cmake >/dev/null; then
    export -f build
    export root site
    part "building kernels/csrc" 15 bash -c build
else
    summary+=("building kernels/csrc: no cmake here")
fi

# warm SHARE: wait for the background compilation, at most SHARE percent of the remaining time.
warm() {
    local end=$((SECONDS + (seconds - SECONDS) * $1 / 100))
    while kill -0 "$warming" 2>/dev/null && ((SECONDS < end)); do
        sleep 1
    done
    local status="not done after $SECONDS s"
    if ! kill -0 "$warming" 2>/dev/null; then
        wait "$warming" && status=done || status="exit status $?"
        warming=
    fi
    summary+=("compiling Triton kernels: $status (waited for at $SECONDS s)")
    tail -n 5 "$out/warm_up.log"
}

# Keywords select the checks; pytest fails if none matches.
export SID_FAST_CHECKS=$out/check.jsonl
check=("$python" -m pytest -v -s --tb=short -p no:cacheprovider -o addopts=)
check+=(tests/gpu/test_acceptance.py -k)
train=("$python" -m benchmarks.train --seconds BUDGET --out "$out/train.jsonl")
kernels=("$python" -m benchmarks.kernels --seconds BUDGET --out "$out/kernels.jsonl")
breakdown=("$python" -m benchmarks.analysis.breakdown --out "$out/breakdown.jsonl")
rm -f "$out"/{check,train,kernels,breakdown,evaluation}.jsonl # runs append to them
processes=$(nproc)
((processes > 8)) && processes=8

test_file() { # tail ignores SIGINT, so that it prints pytest's summary of an interrupted run
    set -o pipefail
    "$python" -m pytest -q -rfE -p no:cacheprovider -o addopts= "$1" 2>&1 |
        (trap '' INT && exec tail -n 25)
}
export -f test_file
export python processes
# shellcheck disable=SC2016
unit_tests=(bash -c 'printf "%s\n" "$@" | xargs -P "$processes" -I{} bash -c "test_file {}"' -)

# With more threads than free cores, threads wait for each other.
((gpu)) || export SID_FAST_GPU_REHEARSAL=1 TRITON_INTERPRET=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
compile=(--compile-only --dtype "bf16,fp32" --parts "$processes")
((gpu)) || compile=(--compile-only --dtype fp32 --kernel sid_loss --parts "$processes")
: >"$out/warm_up.log" # the background process may start late
seq 0 $((processes - 1)) | timeout --kill-after=5 "$seconds" xargs -P "$processes" -I{} \
    "$python" -m benchmarks.kernels "${compile[@]}" --part {} >"$out/warm_up.log" 2>&1 &
warming=$!

if ((gpu)); then
    fixed="published,published bf16"
    variants="default,sid_fast,$fixed,no graphs,sid_fast fp32,cuDNN benchmark"
    variants+=",cuDNN not deterministic,no fused block,no fused group norm,no fused attention"
    variants+=",no fused loss,no fused optimiser,CUDA optimiser,no channels-last"
    part "checks of the default" 30 "${check[@]}" "test_step and default"
    warm 20
    part "training, default" 20 "${train[@]}" --preset cifar10-uncond --micro-batch 64,8 \
        --timed-seconds 6 --max-steps 10 --variants "default,$fixed"
    part "checks of the Triton kernels" 30 "${check[@]}" "test_step and triton"
    part "training, Triton kernels" 25 "${train[@]}" --micro-batch 64 \
        --timed-seconds 6 --max-steps 10 --variants "default,sid_fast,$fixed"
    part "checks of EDM2" 40 "${check[@]}" "test_edm2 and (default or triton)"
    part "checks of networks" 20 "${check[@]}" "test_network"
    part "kernel tests" 35 "${unit_tests[@]}" \
        tests/kernels/group_norm/test_*.py tests/kernels/mp/test_*.py tests/kernels/test_{attention,sid_loss,augment,adam_ema,weight_norm,random,dropout,sida_loss}.py \
        tests/models/test_fused.py
    part "kernels" 30 "${kernels[@]}" --baselines \
        "eager,eager NCHW,fused Adam,apex,sdpa cudnn,sdpa flash,sdpa efficient"
    part "training, all variants" 40 "${train[@]}" --micro-batch 64,256,8 \
        --timed-seconds 8 --max-steps 10 --variants "$variants"
    part "breakdown" 20 "${breakdown[@]}"
    part "training, torch.compile" 50 "${train[@]}" --preset cifar10-uncond,ffhq64 \
        --micro-batch 64,8 --timed-seconds 8 \
        --variants "default,sid_fast,optimised default mode,optimised graphs,optimised,compile"
    part "late checks" 40 "${check[@]}" "test_late"
    part "training, sharded" 30 "${train[@]}" --preset cifar10-uncond --micro-batch 64,8 \
        --timed-seconds 6 --variants "sid_fast,fsdp,fsdp no graphs"
    part "checks of the eager backend" 50 "${check[@]}" "(test_step or test_edm2) and eager"
    part "kernels, torch.compile" 70 "${kernels[@]}" --baselines compile
else
    part "checks of the default" 12 "${check[@]}" "test_step and default and (repeats or resume)"
    warm 10
    train+=(--micro-batch 1 --max-steps 1 --timed-seconds 1)
    part "training, default" 15 "${train[@]}" --variants "published,default"
    part "checks of the Triton kernels" 12 "${check[@]}" "test_step and triton"
    part "training, Triton kernels" 12 "${train[@]}" --variants "sid_fast fp32"
    part "checks of EDM2" 12 "${check[@]}" "test_edm2 and default and repeats"
    part "checks of networks" 20 "${check[@]}" "test_network and cifar10-uncond and fp32"
    part "kernel tests" 15 env PYTEST_ADDOPTS="-k 'hand or limit'" \
        "${unit_tests[@]}" tests/kernels/test_sid_loss.py
    part "kernels" 15 "${kernels[@]}" --dtype fp32 --kernel sid_loss --baselines eager
    part "training, all variants" 15 "${train[@]}" --variants "sid_fast fp32,published"
    part "breakdown" 30 "${breakdown[@]}" --micro-batch 1
    part "training, torch.compile" 25 "${train[@]}" --variants "published,optimised graphs"
    part "late checks" 25 "${check[@]}" "test_late and memory"
    part "training, sharded" 35 "${train[@]}" --variants fsdp
    part "kernels, torch.compile" 40 "${kernels[@]}" --dtype fp32 --kernel sid_loss \
        --baselines nothing
fi
part "evaluation" 90 "$python" -m benchmarks.evaluation --detector pixels \
    --images $((gpu ? 5000 : 100)) --out "$out/evaluation.jsonl"
finish
