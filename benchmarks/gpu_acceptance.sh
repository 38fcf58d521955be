#!/usr/bin/env bash
# Check and measure this tree on a GPU, in one command with a time budget.
#
#   benchmarks/gpu_acceptance.sh [FOLDER] [SECONDS]      (default: benchmarks/results/acceptance, 480)
#
# Needs a Python ($PYTHON, python3) with torch, triton, pytest and the packages that sid_fast imports
# (platformdirs may be missing); nothing is installed or fetched. The most valuable parts come first,
# each within a share of the time left: what a user gets by default, then Triton's kernels, then the
# unit tests and the rest. Meanwhile Triton's kernels compile in the background. Results are complete
# after every row, so a run that is cut off counts as far as it came; SIGTERM and Ctrl-C end it with
# its summary. A tree without its history is told its commit in $SID_FAST_COMMIT. Without a GPU every
# part runs in small, as a rehearsal.
set -u

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=${1:-$root/benchmarks/results/acceptance}
seconds=${2:-480}
python=${PYTHON:-python3}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
log=$out/acceptance.log
: >"$log"
exec > >(trap '' INT TERM && exec tee -a "$log") 2>&1

# The packages as the wheel lays them out, made of links.
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
mkdir -p "$site/sid_fast/kernels"
ln -s "$root"/sid_fast/* "$site/sid_fast/" 2>/dev/null # but for a link to kernels, if there is one
ln -s "$root"/kernels/* "$site/sid_fast/kernels/"
ln -s "$root/benchmarks" "$root/tests" "$root/pyproject.toml" "$site/"
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
    "$python" -m benchmarks.summary "$out"
}
cut_off() {
    trap '' INT TERM
    [[ $running ]] && kill "$running" && wait "$running"
    summary+=("cut off after $SECONDS s")
    finish
    exit 143
}
trap cut_off INT TERM

# part NAME SHARE COMMAND…: run within SHARE percent of the time that is left; BUDGET in the command
# is that many seconds, less what it takes to stop.
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
    # In the background: a signal that comes meanwhile does not wait for it.
    timeout --signal=INT --kill-after=30 "$budget" "${@//BUDGET/$((budget * 3 / 4))}" </dev/null &
    running=$!
    wait "$running" 2>/dev/null # in which bash would tell of one that had to be killed
    status=$?
    running=
    case $status in
        0) status=done ;;
        124 | 137) status="out of time, kept what it had" ;;
        *) status="exit status $status" ;;
    esac
    summary+=("$name: $status after $((SECONDS - start)) s")
}

"$python" - <<'END' || exit 2
import torch, triton
gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU: a rehearsal"
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

# warm: wait for the kernels that compile in the background, at most SHARE percent of the time left.
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

check=("$python" -m benchmarks.check --append --out "$out/check.json" --only)
train=("$python" -m benchmarks.train --append --seconds BUDGET --out "$out/train.json")
kernels=("$python" -m benchmarks.kernels --append --seconds BUDGET --out "$out/kernels.json")
pytest=(-q -p no:cacheprovider -o addopts= -rfE)
tests=(tests/kernels/group_norm tests/kernels/test_{attention,sid_loss,augment,adam_ema}.py
    tests/models/test_fused.py)
processes=$(nproc)
((processes > 8)) && processes=8
if "$python" -c 'import xdist' 2>/dev/null; then
    pytest=("$python" -m pytest -n "$processes" "${pytest[@]}")
else
    pytest=("$python" -m benchmarks.spread "$processes" "${pytest[@]}")
fi
# Several parts append to a file, in which nothing older may be.
rm -f "$out"/{check,train,kernels,breakdown,evaluation}.{json,csv}

# On a machine that others use as well, more threads wait for one another.
((gpu)) || export TRITON_INTERPRET=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
small=() # of the warm-up, without a GPU
((gpu)) || small=(--kernel sid_loss --dtype fp32 --processes 1)
timeout --kill-after=5 "$seconds" "$python" -m benchmarks.warm_up "${small[@]}" </dev/null \
    >"$out/warm_up.log" 2>&1 &
warming=$!

if ((gpu)); then
    fixed="published,published bf16"
    variants="default,ours,$fixed,no graphs,ours fp32,cuDNN benchmark,cuDNN not deterministic"
    variants+=",no fused block,no fused group norm,no fused attention,no fused loss"
    variants+=",no fused optimiser,CUDA optimiser,no channels-last"
    part "checks of the default" 30 "${check[@]}" "default: "
    warm 20
    part "training, default" 20 "${train[@]}" --preset cifar10-uncond --micro-batch 64,8 --share 6 \
        --turns 10 --variants "default,$fixed"
    part "checks of Triton's kernels" 30 "${check[@]}" "triton: "
    part "training, Triton's kernels" 25 "${train[@]}" --micro-batch 64 --share 6 --turns 10 \
        --variants "default,ours,$fixed"
    part "checks of networks" 20 "${check[@]}" "network "
    part "kernel tests" 35 "${pytest[@]}" "${tests[@]}"
    part "kernels" 30 "${kernels[@]}" --rivals \
        "eager,eager NCHW,fused Adam,apex,sdpa cudnn,sdpa flash,sdpa efficient"
    part "training, all variants" 40 "${train[@]}" --micro-batch 64,256,8 --share 8 --turns 10 \
        --variants "$variants"
    part "breakdown" 20 "$python" -m benchmarks.breakdown --out "$out/breakdown.json"
    part "training, compiled rivals" 50 "${train[@]}" --preset cifar10-uncond,ffhq64 \
        --micro-batch 64,8 --share 8 \
        --variants "default,ours,skilled default mode,skilled graphs,skilled,compile"
    part "late checks" 40 "${check[@]}" "late: "
    part "training, in parts" 30 "${train[@]}" --preset cifar10-uncond --micro-batch 64,8 --share 6 \
        --variants "ours,fsdp,fsdp no graphs"
    part "kernels, compiled rivals" 70 "${kernels[@]}" --rivals compile
else # small, and in each part something
    check=("${check[@]:0:6}" --steps 1 --only)
    part "checks of the default" 12 "${check[@]}" "default: re"
    warm 10
    part "training, default" 15 "${train[@]}" --micro-batch 1 --turns 1 --share 1 \
        --variants "published,default"
    part "checks of Triton's kernels" 12 "${check[@]}" "triton: "
    part "training, Triton's kernels" 12 "${train[@]}" --micro-batch 1 --turns 1 --share 1 \
        --variants "ours fp32"
    part "checks of networks" 20 "${check[@]}" "network cifar10-uncond fp32"
    part "kernel tests" 15 "${pytest[@]}" tests/kernels/test_sid_loss.py -k "hand or limit"
    part "kernels" 15 "${kernels[@]}" --dtype fp32 --kernel sid_loss --rivals eager
    part "training, all variants" 15 "${train[@]}" --micro-batch 1 --turns 1 --share 1 \
        --variants "ours fp32,published"
    part "breakdown" 30 "$python" -m benchmarks.breakdown --micro-batch 1 \
        --out "$out/breakdown.json"
    part "training, compiled rivals" 25 "${train[@]}" --micro-batch 1 --turns 1 --share 1 \
        --variants "published,skilled graphs"
    part "late checks" 25 "${check[@]}" "late: memory"
    part "training, in parts" 35 "${train[@]}" --micro-batch 1 --turns 1 --share 1 --variants fsdp
    part "kernels, compiled rivals" 40 "${kernels[@]}" --dtype fp32 --kernel sid_loss \
        --rivals nothing
fi
part "evaluation" 90 "$python" -m benchmarks.evaluation --detector pixels \
    --images $((gpu ? 5000 : 100)) --out "$out/evaluation.json"
finish
