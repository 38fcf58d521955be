"""Choosing backends: overrides, --kernels, NVIDIA's apex, and the report of what runs."""

import sys
from pathlib import Path

import pytest
import torch

from sid_fast import augment, kernels
from sid_fast.errors import UserError
from sid_fast.kernels import _apex, dispatch
from sid_fast.methods.base import RandomStream

CPU = torch.device("cpu")
NVIDIA = [*(f"apex/{file}" for file in _apex.FILES), f"{_apex.EXTENSION}.py"]


@pytest.fixture(autouse=True)
def unforced(monkeypatch):
    monkeypatch.setattr(dispatch._cuda, "library", lambda: None)
    dispatch.force(None)
    yield
    dispatch.force(None)


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Return make(*files), which puts a folder of these files, all raising, first on sys.path."""
    _apex._module.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] in ("apex", _apex.EXTENSION)]:
        monkeypatch.delitem(sys.modules, name)

    def make(*files: str) -> Path:
        for file in files:
            path = tmp_path / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("raise AssertionError('a package was imported to identify it')")
        monkeypatch.syspath_prepend(str(tmp_path))
        return tmp_path

    yield make
    _apex._module.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == "apex"]:
        del sys.modules[name]


GPU = torch.device("cuda")


def test_defaults_of_a_gpu():
    """The Triton kernels that move less at a known cost; PyTorch's elsewhere."""
    triton = {name for name, backend in dispatch.runs(GPU).items() if backend == "triton"}
    assert triton == {
        "group_norm",
        "sid_loss",
        "sida_loss",
        "random",
        "adam_ema",
        "weight_norm",
        "mp",
    }
    assert set(dispatch.runs(GPU).values()) == {"triton", "eager"}


def test_defaults_of_a_cpu(monkeypatch):
    """Eager, and the C++ update where it was built."""
    monkeypatch.setattr(dispatch._cuda, "library", object)
    eager = dict.fromkeys(dispatch.OPERATIONS, "eager")
    assert dispatch.runs(CPU) == eager | {"group_norm": "cuda", "adam_ema": "cuda"}
    assert dispatch.report(CPU) == "group_norm, adam_ema C++, the rest eager"
    monkeypatch.setattr(dispatch._cuda, "library", lambda: None)
    assert dispatch.runs(CPU) == eager


def test_defaults_without_triton(monkeypatch):
    monkeypatch.setattr(dispatch, "AVAILABLE", False)
    assert set(dispatch.runs(GPU).values()) == {"eager"}


def test_triton_replaces_a_backend_that_an_operation_lacks(monkeypatch):
    with dispatch.forced("cuda"):
        monkeypatch.setattr(dispatch._cuda, "library", object)
        assert dispatch.choose("adam_ema", CPU) == "cuda"
        assert dispatch.choose("attention", CPU) == "triton"
        monkeypatch.setattr(dispatch._cuda, "library", lambda: None)
        assert dispatch.choose("adam_ema", CPU) == "triton"


def test_one_operation_is_overridden_and_restored():
    with dispatch.forced("triton"):
        with dispatch.forced({"group_norm": "eager"}):
            assert dispatch.choose("group_norm", CPU) == "eager"
            assert dispatch.choose("attention", CPU) == "triton"
            assert dispatch.report(CPU) == "group_norm eager, the rest triton"
        assert dispatch.report(CPU) == "triton"
    assert dispatch.report(CPU) == "eager"


def test_every_public_function_chooses_its_own_backend(monkeypatch):
    """Each function passes its own operation's name to `choose`."""
    asked = []
    for name, module in list(sys.modules.items()):
        ours = name.startswith("sid_fast.kernels.") and name != dispatch.__name__
        if ours and hasattr(module, "choose"):
            monkeypatch.setattr(
                module, "choose", lambda op, device=None: asked.append(op) or "eager"
            )
    ones = torch.ones(1, 12, 4, 4)
    kernels.group_norm(ones, ones[0, :, 0, 0], ones[0, :, 0, 0], 4, 1e-5)
    kernels.attention(ones, 1)
    noised = kernels.noised(ones, torch.ones(1), ones)
    kernels.generator_loss(ones, ones, noised, ones, 1.2)
    kernels.fake_score_loss(ones, noised, ones)
    one = torch.ones(1)
    kernels.discriminator_loss(ones[:, :1], ones[:, :1], one, one > 0, 1)
    kernels.adversarial_loss(ones[:, :1], one, one > 0, 1)
    parameters = augment.draw(RandomStream(torch.tensor([0, 0, 0]), "fake", 1), 0.5)
    kernels.augment(ones, parameters)
    zero, lists = torch.zeros((), dtype=torch.float64), [[torch.ones(2)] for _ in range(3)]
    update = {"enabled": zero > 1, "lr": 1e-3, "beta1": 0.0, "beta2": 0.9, "eps": 1e-8}
    kernels.adam_ema(*lists[:2], [], lists[2], [], step=zero, **update)
    weights = [torch.ones(2, 2)]
    kernels.weight_norm(weights, [torch.empty(2, 2)])
    kernels.weight_norm_backward(weights, weights)
    kernels.pixel_norm(ones)
    kernels.scaled_silu(ones, ones[:, :, 0, 0])
    kernels.mp_sum(ones, ones, 0.3)
    kernels.mp_cat_silu(ones)
    losses, draws = ["sid_loss"] * 3 + ["sida_loss"] * 2, ["random"] * 2
    update = ["adam_ema"] + ["weight_norm"] * 2 + ["mp"] * 4
    assert asked == ["group_norm", "attention", *losses, *draws, "augment", *update]


@pytest.mark.parametrize("names", ["cudnn", {"group_norm": "cudnn"}, {"softmax": "triton"}, "apex"])
def test_an_unknown_name_is_refused(names, packages):
    packages("apex/__init__.py")
    with pytest.raises(ValueError, match="unknown"):
        dispatch.force(names)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("auto", "eager"),
        ("triton", "triton"),
        ("triton,group_norm=eager", {"group_norm": "eager", "attention": "triton"}),
        ("sid_loss=triton,augment=triton", {"group_norm": "eager", "sid_loss": "triton"}),
        ("triton,attention=auto", {"attention": "eager", "augment": "triton"}),
    ],
)
def test_kernels_option(text, wanted, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    dispatch.configure(text, CPU)
    if isinstance(wanted, str):
        assert dispatch.report(CPU) == wanted
    else:
        assert {operation: dispatch.choose(operation, CPU) for operation in wanted} == wanted


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cudnn", ["no backend 'cudnn'", "auto, cuda, triton, eager"]),
        ("triton,softmax=eager", ["operation 'softmax'", "group_norm, attention"]),
        ("attention=cuda", ["no backend 'cuda' for attention", "auto, eager, triton"]),
        ("triton,", ["no backend ''", "auto"]),
        ("attention=reference", ["now called `eager`"]),
        ("group_norm=apex", ["NVIDIA's", "PyPI", "auto, eager, triton"]),
        ("adam_ema=apex", ["apex", "auto, eager, triton, cuda"]),
    ],
)
def test_kernels_option_refuses(text, words, packages):
    packages("apex/__init__.py", "apex/models.py")
    with pytest.raises(UserError) as refused:
        dispatch.configure(text, CPU)
    assert all(word in str(refused.value) for word in [f"kernels={text}", *words]), refused.value


@pytest.mark.parametrize("text", ["triton", "cuda", "augment=triton"])
def test_triton_on_a_cpu_needs_its_interpreter(text, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match="TRITON_INTERPRET"):
        dispatch.configure(text, CPU)
    assert dispatch.report(CPU) == "eager"


@pytest.mark.parametrize(
    "files",
    [
        [],
        ["apex/__init__.py", "apex/models.py"],  # PyPI's
        ["apex.py"],
        ["apex/__init__.py", *NVIDIA[:-1]],  # built without the extension
        ["apex/__init__.py", NVIDIA[0], NVIDIA[-1]],
        ["apex/__init__.py", NVIDIA[1], NVIDIA[-1]],
    ],
)
def test_another_apex_is_neither_used_nor_imported(files, packages):
    packages(*files)
    assert not _apex.installed()
    assert "apex" not in dispatch.available_backends()
    with pytest.raises(RuntimeError, match="not installed"):
        _apex._module()


def test_an_apex_in_sys_modules_takes_precedence(packages, monkeypatch):
    """`import apex` would return it, regardless of sys.path."""
    packages("apex/__init__.py", *NVIDIA)
    assert _apex.installed()
    monkeypatch.setitem(sys.modules, "apex", type(sys)("apex"))
    assert not _apex.installed()


def test_nvidias_apex_is_a_backend_of_group_norm_only(packages):
    packages("apex/__init__.py", *NVIDIA)
    with dispatch.forced("apex"):
        assert dispatch.choose("group_norm", CPU) == "apex"
        assert dispatch.choose("adam_ema", CPU) == "triton"
    with pytest.raises(UserError, match="NVIDIA GPUs only"):
        dispatch.configure("group_norm=apex", CPU)
    dispatch.configure("group_norm=apex", GPU)
    assert dispatch.report(GPU) == (
        "group_norm apex, block, attention, augment eager, the rest triton"
    )


def test_apex_gets_the_pass_count_and_activation_name_it_expects(packages):
    """Two passes above 1024 pixels; "silu" or an empty string."""
    folder = packages("apex/__init__.py", *NVIDIA)
    (folder / "apex/__init__.py").write_text("")
    (folder / NVIDIA[0]).write_text(
        "class GroupNorm:\n"
        "    SUPPORTED_CHANNELS, SUPPORTED_GROUPS = {128}, {32}\n"
        "def cuda_group_norm_nhwc_one_pass(*a): return 'one', *a\n"
        "def cuda_group_norm_nhwc_two_pass(*a): return 'two', *a\n"
    )
    x = torch.zeros(1, 128, 32, 32)
    assert _apex.group_norm(x, None, None, 32, 1e-6, True)[0] == "one"
    assert _apex.group_norm(x, 1, 2, 32, 1e-6, True)[2:] == (32, 1, 2, 1e-6, "silu")
    assert _apex.group_norm(x, 1, 2, 32, 1e-6, False)[-1] == ""
    assert _apex.group_norm(torch.zeros(1, 128, 33, 32), 1, 2, 32, 1e-6, True)[0] == "two"
    assert not _apex.is_supported(x, 32)  # on a CPU


def test_apex_runs_plain_norms_only(packages, monkeypatch):
    """A norm with any other fused operation runs Triton's kernel."""
    packages("apex/__init__.py", *NVIDIA)
    monkeypatch.setattr(_apex, "is_supported", lambda x, groups: True)
    monkeypatch.setattr(_apex, "group_norm", lambda x, *rest: x + 5)
    x, weight = torch.zeros(1, 8, 2, 2), torch.ones(8)
    with dispatch.forced("apex"):
        out = kernels.group_norm(x, weight, weight, 2, 1e-6)
        assert torch.equal(out.y, x + 5)
        assert torch.equal(out.h, x)
        out = kernels.group_norm(x, weight, weight, 2, 1e-6, add=torch.zeros(1, 8))
        assert not torch.equal(out.y, x + 5)
