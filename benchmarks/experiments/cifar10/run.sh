#!/usr/bin/env bash
# Train a teacher of CIFAR-10 and distil it with SiD, SiDA and SiD²A on one GPU, within a time budget.
#
#   benchmarks/experiments/cifar10/run.sh IMAGES DETECTOR [FOLDER] [SECONDS]    (default: runs/cifar10, 1700)
#
# IMAGES is an EDM data set of 32x32 images with labels, DETECTOR a TorchScript file (its code runs)
# or `pixels`. The teacher gets half of the time, SiD and SiDA 19 % each, SiD²A 10 %, each with its
# start-up. FOLDER receives the runs, and in FOLDER/experiment what belongs beside this file.
# $PYTHON (default python3) needs torch, triton and the dependencies of sid_fast except platformdirs.
# Without a GPU a rehearsal runs every part with tiny networks for a few steps.
set -eu

if (($# < 2)); then
    sed -n '2,/^set/{/^set/!s/^# \?//p}' "$0" >&2
    exit 2
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)
images=$(realpath "$1")
judge=(--detector pixels)
[[ $2 == pixels ]] || judge=(--detector "$(realpath "$2")" --trust)
folder=${3:-$root/runs/cifar10}
seconds=${4:-1700}
python=${PYTHON:-python3}
mkdir -p "$folder" && folder=$(cd "$folder" && pwd)

# shellcheck source=benchmarks/layout.sh
. "$root/benchmarks/layout.sh"
export PYTHONUNBUFFERED=1
cd "$site"

# 13.9 M parameters: a quarter of the published network's.
teacher=(--model-channels 64 --batch-size 512 --lr-rampup-kimg 50 --ema-halflife-kimg 100)
short=(--batch-size 256 --fake-lr 2e-4 --generator-lr 1e-4 --ema-halflife-kimg 20)
often=(--snapshot-every 50 --eval-every 50 --eval-images 10000)
length=(--kimg 100000)
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    teacher=(--model-channels 16 --channel-mult 1 --num-blocks 1 --batch-size 8)
    short=(--batch-size 32)
    often=(--snapshot-every 0.032 --eval-every 0.032 --eval-images 32)
    length=(--kimg 0.064)
fi

# within SHARE COMMAND…: run a command of sid_fast for SHARE percent of the time. Status 75 says that
# its time was up.
within() {
    local hours status=0
    hours=$("$python" -c "print($seconds * $1 / 100 / 3600)")
    "$python" -m "sid_fast.$2" "${@:3}" "${length[@]}" --data "$images" --max-hours "$hours" \
        --keep-snapshots 1000 --keep-states 1 --tune off || status=$?
    ((status == 0 || status == 75)) || exit "$status"
}
distil() { # distil SHARE NAME PRESET OPTION…
    within "$1" train --preset "$3" --teacher "$folder/teacher" --out "$folder/$2" "${short[@]}" \
        "${often[@]}" "${judge[@]}" "${@:4}"
}
within 50 pretrain --out "$folder/teacher" "${teacher[@]}" "${often[@]:0:2}"
distil 19 sid cifar10-cond --alpha 1.2 --teacher-steps 18
distil 19 sida cifar10-cond-sida --generator-start-kimg 10 --adversarial-start-kimg 20 --teacher-steps 0
distil 10 sid2a cifar10-cond-sid2a --generator "$folder/sid" --generator-start-kimg 10 \
    --adversarial-start-kimg 20 --teacher-steps 0
"$python" -m benchmarks.analysis.experiment "$folder/experiment" "SiD, α 1.2=$folder/sid" \
    "SiDA=$folder/sida" "SiD²A=$folder/sid2a"
echo "copy $folder/experiment to benchmarks/experiments/cifar10"
