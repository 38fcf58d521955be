#!/usr/bin/env bash
# What a GPU machine has to say of this tree, in one command with a time budget.
#
#   benchmarks/gpu_session.sh [FOLDER] [SECONDS]      (default: benchmarks/results/session, 480)
#
# Needs a Python ($PYTHON, python3) with torch, triton and pytest; nothing is installed or fetched.
# What is worth most comes first, each part within a share of the time that is left. Results are
# whole after every row, so a session that is cut off counts as far as it came; SIGTERM and Ctrl-C
# end it with its summary. A tree without its history is told its commit in $SID_FAST_COMMIT. Without
# a GPU everything runs in small, as a rehearsal.
set -u

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=${1:-$root/benchmarks/results/session}
seconds=${2:-480}
python=${PYTHON:-python3}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
log=$out/session.log
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
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-${TMPDIR:-/tmp}/sid_fast-inductor}
export SID_FAST_COMMIT=${SID_FAST_COMMIT:-$(git -C "$root" describe --always --dirty 2>/dev/null)}
export SID_FAST_SHARED=${SID_FAST_SHARED:-$([ -d "$root/shared" ] && echo "$root/shared" || echo "$root/../shared")}
PATH=$PATH:/usr/local/cuda/bin

summary=()
running=
finish() {
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

tests=(tests/test_{attention,group_norm,sid_loss,augment,adam_ema,fused}.py)
workers=()
"$python" -c 'import xdist' 2>/dev/null && workers=(-n 8)
pytest=("$python" -m pytest -q -p no:cacheprovider -o addopts= -rfE)
if ((gpu)); then
    variants="ours,published,published bf16,no graphs,ours fp32,cuDNN tuned,no fused block"
    variants+=",no fused group norm,no fused attention,no fused loss,no fused optimiser"
    variants+=",CUDA optimiser,no channels-last"
    part "kernel tests" 30 "${pytest[@]}" "${workers[@]}" -m "" "${tests[@]}"
    part "checks" 35 "$python" -m benchmarks.check --out "$out/check.json"
    part "kernels" 25 "$python" -m benchmarks.kernels --seconds BUDGET --out "$out/kernels.json" \
        --rivals "eager,fused Adam,apex,sdpa cudnn,sdpa flash,sdpa efficient"
    part "training" 55 "$python" -m benchmarks.train --seconds BUDGET --out "$out/train.json" \
        --micro-batch 64,256,8 --share 8 --turns 10 --variants "$variants"
    part "breakdown" 20 "$python" -m benchmarks.breakdown --out "$out/breakdown.json"
    part "training, compiled rivals" 70 "$python" -m benchmarks.train --append --seconds BUDGET \
        --out "$out/train.json" --preset cifar10-uncond,ffhq64 --micro-batch 64 --share 8 \
        --variants "ours,skilled default mode,skilled,compile"
    part "training, in parts" 20 "$python" -m benchmarks.train --append --seconds BUDGET \
        --out "$out/train.json" --preset cifar10-uncond --micro-batch 64,8 --share 6 \
        --variants "ours,fsdp,fsdp no graphs"
    part "kernels, compiled rivals" 80 "$python" -m benchmarks.kernels --append --seconds BUDGET \
        --out "$out/kernels.json" --rivals compile
else
    export TRITON_INTERPRET=1
    part "kernel tests" 25 "${pytest[@]}" -x tests/test_sid_loss.py -k "noised"
    part "checks" 40 "$python" -m benchmarks.check --only re --out "$out/check.json"
    part "kernels" 40 "$python" -m benchmarks.kernels --dtype fp32 --kernel sid_loss --rivals eager \
        --seconds BUDGET --out "$out/kernels.json"
    part "training" 60 "$python" -m benchmarks.train --seconds BUDGET --out "$out/train.json" \
        --micro-batch 2 --turns 2 --share 5 --variants "ours,ours fp32,published,published bf16"
    part "breakdown" 40 "$python" -m benchmarks.breakdown --out "$out/breakdown.json"
fi
part "evaluation" 90 "$python" -m benchmarks.evaluation --detector pixels \
    --images $((gpu ? 5000 : 100)) --out "$out/evaluation.json"
finish
