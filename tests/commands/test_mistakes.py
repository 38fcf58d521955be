"""Command lines as users mistype them: one line that says what to do, and nothing written."""

import pytest

from sid_fast.models import EDMNetwork, NetworkConfig
from sid_fast.models.registry import save_network
from sid_fast.tools import host_memory
from tests.helpers.networks import small_teacher

TYPED = {
    "train --presett digits": [
        "No such option", "--presett", "--preset", "python -m sid_fast.train --help",
    ],
    "train --preset cifar10": ["preset 'cifar10' is unknown", "cifar10-uncond"],
    "train --preset fasion": ["did you mean fashion? All presets: afhqv2-64, afhqv2-64-sid2a"],
    "train --preset xyz": ["preset 'xyz' is unknown: choose from afhqv2-64, afhqv2-64-sid2a"],
    "train --teacher cifar10-conditional": ["cifar10-conditional", "cifar10-cond"],
    "train digits": ["unexpected extra argument", "digits"],
    "train --teacher T --batch-size 64k": ["'64k' is not a valid integer", "--batch-size"],
    "train --teacher T --precision fp8": ["'fp8'", "'bf16'"],
    "train --teacher T --resume RUN": ["resume=RUN does not exist", "a run folder"],
    "generate --network T --seeds 0..63 --out out": ["'0..63'", "0-63"],
    "generate --network T": ["nothing to write", "--out", "--grid"],
    "evaluate --network T": ["a reference is missing", "--data", "--ref"],
    "evaluate --network T --detector pixels --data real.zipp": ["real.zipp"],
    "evaluate --network T --data real.zipp": ["real.zipp does not exist"],  # before the download
    "evaluate --network fashion --data digits --detector pixels -n 9": ["16x16", "8x8 (1)"],
    "evaluate --network T --device cuda:7 --data digits": ["device=cuda:7", "cpu"],
    "evaluate --network T --images T --data digits": ["--network and --images", "leave out one"],
    "plan --preset cifar10-cond --card b300": ["'b300'", "'h200'"],
    "pretrain --data digits --attention-resolutions 17": ["17 is no level", "from 8, 4, 2"],
    "pretrain --dataset images.zip": ["No such option", "--data"],
    "export --network T": ["out is missing", "--out NAME", ".pkl, .onnx, .pt2, .safetensors"],
    "export --out x.pkl": ["network is missing", "--network FILE"],
    "export --network T --out x.tflite": ["out=x.tflite", ".pkl, .onnx, .pt2, .safetensors"],
    "export --network T --out x.PKL": ["out=x.PKL", ".pkl"],
    "export --network T --out x": ["out=x: the ending", ".pkl"],
    "export --network none.pkl --out x.pkl": ["none.pkl does not exist"],
    "export --network T --out T": ["is the network itself", "another name"],
    "export --network T --out T.safetensors/x.pkl": ["T.safetensors/x.pkl", "cannot be written"],
    "export --network T --out x.pkl --init-sigma 0": ["init_sigma=0"],
}  # fmt: skip

EMPTY = [  # an unset shell variable
    "train --teacher T --resume=", "train --teacher T --data=", "train --teacher T --ref=",
    "train --teacher T --detector=", "train --teacher=", "train --teacher T --out=",
    "pretrain --data= --kimg 1",
    "generate --network= --out out", "generate --network T --out=", "generate --network T --grid=",
    "evaluate --network T --data= --ref r.npz", "evaluate --network T --data digits --out=",
    "evaluate --network T --data digits --protocol=", "evaluate reference --data= --out x.npz",
    "plan --teacher=", "export --network= --out x.pkl", "export --network T --out=",
]  # fmt: skip

IDLE = {  # options that would do nothing, and what they need
    "train --teacher T --detector pixels": ("--detector", "--eval-every"),
    "train --teacher T --ref r.npz": ("--ref", "--eval-every"),
    "train --teacher T --eval-images 100": ("--eval-images", "--eval-every"),
    "train --teacher T --teacher-steps 0": ("--teacher-steps", "--eval-every"),
    "train --teacher T --data digits --eval-every 1 --trust": ("--trust", "--detector FILE"),
    "train --teacher T --shard-group 2": ("--shard-group", "several processes"),
    "train --teacher T --cuda-graph on --device cpu": ("cuda-graph=on", "needs a GPU"),
    "pretrain --data digits --detector pixels": ("--detector", "--eval-every"),
    "pretrain --data digits --shard-group 1": ("--shard-group", "several processes"),
    "generate --network T --out out --steps 4 --init-sigma 2": ("--init-sigma", "--steps 1"),
    "generate --network T --out out --class 10": ("class=10", "0 to 9"),
    "evaluate --images digits --data digits --steps 4": ("--steps", "--network"),
    "evaluate --images digits --data digits --init-sigma 2": ("--init-sigma", "--network"),
    "evaluate --images digits --data digits --seeds 0-9": ("--seeds", "--network"),
    "evaluate --images digits --data digits --protocol edm": ("--protocol", "--network"),
    "evaluate --network T --data digits --steps 4 --init-sigma 2": ("--init-sigma", "--steps 1"),
    "evaluate --network T --ref r.npz --reader plain": ("--reader", "--data or --images"),
    "evaluate --network T --ref r.npz --data digits --metrics fid": ("--data", "kid or pr"),
    "evaluate --network T --data digits --trust": ("--trust", "--detector FILE"),
    "evaluate --network T --data digits --detector pixels --batch 4": ("--batch", "--detector"),
    "evaluate --network T --ref r.npz --metrics fid,kid": ("kid", "--data"),
    "evaluate --network T --data digits --detector pixels --metrics is": ("is", "--detector"),
    "evaluate --network T reference --data digits --out x.npz": ("--network", "reference"),
    "evaluate reference --data digits --out x.npz --trust": ("--trust", "--detector FILE"),
    "export --network T --out x.pt2 --fp16": ("--fp16", "--out NAME.pkl"),
    "plan --teacher T --micro-batch 4": ("--micro-batch", "largest"),
    "plan --teacher T --link 40": ("--link", "--gpus"),
}  # fmt: skip

TOO_LARGE = [  # on a machine of 1 GiB
    "train --teacher T --batch-size 16777216",
    "train --teacher T --batch-size 16777216 --micro-batch 8388608",
    "pretrain --data digits --batch-size 16777216",
    "pretrain --data digits --model-channels 4096 --num-blocks 64",
    "generate --network T --out out.zip --seeds 0-99999999",
    "generate --network T --out out --seeds 0-9999999 --batch 100000000",
    "evaluate --network T --data digits --detector pixels --seeds 0-99999999",
    "evaluate --network T --data digits --detector T --trust --batch 16777216",
    "evaluate --network T --data digits --detector pixels -n 3000000",
    "train --teacher T --data digits --eval-every 1 --eval-images 3000000 --detector pixels",
    "pretrain --data digits --eval-every 1 --eval-images 3000000 --detector pixels",
]


@pytest.fixture
def run(run_command, monkeypatch, tmp_path, cache):
    """run("train --preset x"), in a folder that holds a network, T -> its one line."""
    monkeypatch.chdir(tmp_path)
    save_network("T.safetensors", small_teacher())

    def run(line: str) -> str:
        status, error = run_command(*("T.safetensors" if w == "T" else w for w in line.split()))
        told = [each for each in error.splitlines() if "without DALI" not in each]
        told = [each for each in told if "running the TorchScript" not in each]
        assert status == 2, error
        assert len(told) == 1, error
        assert {p.name for p in tmp_path.iterdir()} <= {"T.safetensors", "cache"}
        return told[0]

    return run


@pytest.mark.parametrize("line", TYPED)
def test_a_mistyped_command_line(run, line):
    told = run(line)
    for word in TYPED[line]:
        assert word in told


def test_an_option_that_moved_to_another_command_is_not_suggested(run):
    told = run("train --preset digits --kmg 3")
    assert "--kimg" in told
    assert "--mfu" not in told


@pytest.mark.parametrize("line", EMPTY)
def test_an_empty_value_is_refused(run, line):
    option = next(word for word in line.split() if word.endswith("="))
    assert f"error: {option[:-1]} is empty, perhaps an unset shell variable" in run(line)


@pytest.mark.parametrize("line", IDLE)
def test_an_option_without_effect_is_refused(run, line):
    told = run(line)
    for word in IDLE[line]:
        assert word in told


@pytest.mark.parametrize("line", TOO_LARGE)
def test_too_much_for_the_memory_is_refused_before_it_is_allocated(run, monkeypatch, line):
    monkeypatch.setattr(host_memory, "host_memory", lambda: 2**30)
    monkeypatch.setattr(host_memory, "MAX_FEATURES", 10**9)  # of images of 64 pixels
    assert "GiB of memory, and this machine has 1" in run(line)


@pytest.mark.parametrize("line", ["-n 1000000000000", "--seeds 0-99999999,5"])
def test_too_many_images_are_refused(run, line):
    told = run(f"evaluate --network T --data digits --detector pixels {line}")
    assert "10^8" in told or "100000000" in told


@pytest.mark.parametrize("line", ["generate --out out", "evaluate --data digits --detector pixels"])
def test_a_small_file_of_a_large_network_is_not_run(run, line):
    """512 kB of weights ask for 75 GB of feature maps."""
    net = EDMNetwork(
        NetworkConfig(
            "ddpmpp", resolution=4096, channels=1, model_channels=16, channel_mult=(1,),
            num_blocks=1, attention_resolutions=(),
        )
    )  # fmt: skip
    save_network("T.safetensors", net)
    command, *more = line.split()
    told = run(" ".join([command, "--network T", *more]))
    assert "generating 16 images with a ddpmpp, 4096x4096, unconditional network would take" in told
