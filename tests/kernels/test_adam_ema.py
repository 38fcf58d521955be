"""Adam with EMA and compute weights: every backend against float64."""

import ctypes
import importlib
import shutil

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sid_fast import kernels
from sid_fast.kernels import _cuda, dispatch
from tests.helpers.golden import relative
from tests.helpers.library import build

module = importlib.import_module("sid_fast.kernels.adam_ema")

# Relative error, in norm, of the updated tensors in float32, by backend.
TOLERANCE = {"triton": 1e-6, "cuda": 1e-6, "eager": 1e-6}
# Convolutions, among them one of several chunks and one whose size is not a multiple of four; a
# linear layer; biases; a scalar.
SHAPES = [(128, 3, 3, 3), (48, 36, 3, 3), (5, 7, 3, 3), (32, 20, 1, 1), (130, 67), (192,), (3,), ()]


@pytest.fixture(params=["triton", "cuda", "eager"])
def backend(request, monkeypatch):
    if request.param == "cuda":
        library = request.getfixturevalue("library")
        monkeypatch.setattr(_cuda, "library", lambda: library)
    with dispatch.forced(request.param):
        yield request.param


def make(device, shapes=SHAPES, channels_last=False, compute_weights=None, seed=0):
    """Draw the lists that adam_ema takes; the first four gradients start with NaN, ±inf and NaN."""
    rng = torch.Generator().manual_seed(seed)

    def tensors(positive=False):
        out = []
        for shape in shapes:
            t = torch.randn(shape, generator=rng)
            t = t.square() if positive else t
            if channels_last and t.dim() == 4:
                t = t.to(memory_format=torch.channels_last)
            out.append(t.to(device))
        return out

    lists = {name: tensors(name == "exp_avg_sq") for name in ("params", "grads")}
    lists |= {"exp_avg": tensors(), "exp_avg_sq": tensors(True), "ema": tensors()}
    for i, value in enumerate((torch.nan, torch.inf, -torch.inf, torch.nan)):
        if i < len(shapes):
            lists["grads"][i][(0,) * len(shapes[i])] = value
    if compute_weights:
        dtype = compute_weights
        lists["compute_weights"] = [torch.full_like(p, 77, dtype=dtype) for p in lists["params"]]
    return lists


def run(
    lists, step=3.0, enabled=True, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, ema_beta=0.97,
    **clip,
):  # fmt: skip
    device = lists["params"][0].device
    step = torch.tensor(step, dtype=torch.float64, device=device)
    bad = kernels.adam_ema(
        **lists,
        step=step,
        enabled=torch.tensor(enabled, device=device),
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        ema_beta=ema_beta,
        **clip,
    )
    return bad, step


def expected(
    lists, step=3.0, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, ema_beta=0.97, clip=torch.inf
):
    """Compute the update in float64, from the paper's equations."""
    lists = {name: [t.double() for t in tensors] for name, tensors in lists.items()}
    out = {name: [] for name in lists}
    for i, p in enumerate(lists["params"]):
        g = lists["grads"][i].nan_to_num(0, 1e5, -1e5).clamp(-clip, clip)
        m = beta1 * lists["exp_avg"][i] + (1 - beta1) * g if lists["exp_avg"] else g
        v = beta2 * lists["exp_avg_sq"][i] + (1 - beta2) * g**2
        t = step + 1
        first = m / (1 - beta1**t) if lists["exp_avg"] else m
        p = p - lr * first / ((v / (1 - beta2**t)).sqrt() + eps)
        out["params"].append(p)
        out["grads"].append(g)
        out["exp_avg"].append(m)
        out["exp_avg_sq"].append(v)
        if lists["ema"]:
            out["ema"].append(p + ema_beta * (lists["ema"][i] - p))
    return out


def rounded(p, dtype, backend):
    """Round p to 16 bits; for bfloat16, Triton's interpreter truncates, unlike its compiler."""
    if backend == "triton" and p.device.type == "cpu" and dtype == torch.bfloat16:
        return (p.view(torch.int32) & -65536).view(torch.float32).to(dtype)
    return p.to(dtype)


def flat(tensors):
    return torch.cat([t.double().flatten() for t in tensors])


def clone(lists):
    return {
        name: [t if t is None else t.clone() for t in tensors] for name, tensors in lists.items()
    }


def same(a, b) -> bool:
    """Return whether a and b are bit-identical, NaN included."""
    return a.shape == b.shape and torch.equal(
        a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)
    )


@pytest.mark.parametrize("compute_weights", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("beta1", "ema"), [(0.0, True), (0.9, True), (0.0, False)])
def test_update_matches_float64(device, backend, beta1, ema, channels_last, compute_weights):
    lists = make(device, channels_last=channels_last, compute_weights=compute_weights)
    if not beta1:
        lists["exp_avg"] = []
    if not ema:
        lists["ema"] = []
    before = clone(lists)
    bad, step = run(lists, beta1=beta1)
    wanted = expected(before, beta1=beta1)
    assert int(bad) == 4
    assert float(step) == 4
    tolerance = TOLERANCE[backend]
    assert torch.equal(flat(lists["grads"]), flat(wanted["grads"]))
    for name in ("params", "exp_avg_sq", "exp_avg" if beta1 else "params", "ema"):
        if lists[name]:
            assert relative(flat(lists[name]), flat(wanted[name])) <= tolerance, name
    # Compare the change too: an update of 1e-3 hides in a weight of 1.
    moved = flat(lists["params"]) - flat(before["params"])
    assert relative(moved, flat(wanted["params"]) - flat(before["params"])) <= 1e-3
    if compute_weights:
        for copy, p in zip(lists["compute_weights"], lists["params"], strict=True):
            assert same(copy, rounded(p, compute_weights, backend))


@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_values_beyond_the_clip_are_clipped_and_counted(device, backend, beta1):
    """Infinite ones among them; NaN is 0, and a value of the clip itself is not beyond it."""
    lists = make(device)
    lists["grads"][0].view(-1)[5:8] = torch.tensor([0.5, -0.5, -0.75], device=device)
    if not beta1:
        lists["exp_avg"] = []
    before = clone(lists)
    clipped = torch.full((), -1, device=device)
    bad, _ = run(lists, beta1=beta1, clip=0.5, clipped=clipped)
    wanted = expected(before, beta1=beta1, clip=0.5)
    assert int(bad) == 4
    assert int(clipped) == int((flat(before["grads"]).nan_to_num(0).abs() > 0.5).sum())
    assert torch.equal(flat(lists["grads"]), flat(wanted["grads"]))
    for name in ("params", "exp_avg_sq", "exp_avg" if beta1 else "params", "ema"):
        assert relative(flat(lists[name]), flat(wanted[name])) <= TOLERANCE[backend], name


def test_channels_last_compute_weights_of_contiguous_parameters(device, backend):
    lists = make(device, compute_weights=torch.bfloat16)
    lists["compute_weights"] = [
        w.to(memory_format=torch.channels_last) if w.dim() == 4 else w
        for w in lists["compute_weights"]
    ]
    run(lists)
    for copy, p in zip(lists["compute_weights"], lists["params"], strict=True):
        assert torch.equal(copy, rounded(p, torch.bfloat16, backend))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_parameter_may_have_no_compute_weight(device, backend, dtype):
    """First every other parameter, starting with the first, then all."""
    lists = make(device, compute_weights=dtype)
    full = clone(lists)
    run(full)
    for without in (range(0, len(SHAPES), 2), range(len(SHAPES))):
        partial = clone(lists)
        for i in without:
            partial["compute_weights"][i] = None
        run(partial)
        for name in full:
            for i, (a, b) in enumerate(zip(partial[name], full[name], strict=True)):
                absent = name == "compute_weights" and i in without
                assert a is None if absent else same(a, b), (name, i)


def test_rounding_to_16_bits_equals_the_hardwares(device, backend):
    """Copy ties, the smallest and largest values and infinity with a learning rate of 0."""
    mantissas = torch.arange(1, 4, 2**-13)
    values = torch.cat([mantissas * 2.0**e for e in (-140, -126, -26, -25, -15, -14, 0, 14, 15)])
    values = torch.cat([values, torch.tensor([65519.99, 65520, 3.4e38, torch.inf, 0.0])])
    values = torch.cat([values, -values]).to(device)
    for dtype in (torch.bfloat16, torch.float16):
        lists = make(device, [(len(values) + 1,)], compute_weights=dtype)
        lists["params"] = [torch.cat([values, values.new_tensor([torch.nan])])]
        lists["exp_avg"] = lists["ema"] = []
        run(lists, lr=0.0, beta1=0.0)
        copy = lists["compute_weights"][0]
        assert copy[-1].isnan()
        if dtype == torch.float16 or rounded(values, dtype, backend).equal(values.to(dtype)):
            assert same(copy[:-1], values.to(dtype))


@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_a_disabled_update_cleans_gradients_and_changes_nothing_else(device, backend, beta1):
    lists = make(device, compute_weights=torch.bfloat16)
    lists["params"][0].view(-1)[3] = torch.nan
    lists["params"][1].view(-1)[3] = -0.0
    lists["grads"][1].view(-1)[3] = 1e30  # whose square is infinite
    if not beta1:
        lists["exp_avg"] = []
    before = clone(lists)
    bad, step = run(lists, enabled=False, beta1=beta1)
    assert float(step) == 3
    assert int(bad) == 4
    assert torch.equal(flat(lists["grads"]), flat(before["grads"]).nan_to_num(0, 1e5, -1e5))
    for name in set(lists) - {"grads"}:
        for after, unchanged in zip(lists[name], before[name], strict=True):
            assert same(after, unchanged), name


def test_scalars_may_be_float64_tensors(device, backend):
    """With 1 − β of 1e-7 at a late step, the EMA moves as in float64."""
    lists = make(device, [(4096,)])
    lists["ema"] = [torch.zeros_like(p) for p in lists["params"]]
    twin = clone(lists)
    scalars = dict(lr=2e-3, ema_beta=1 - 1e-7)
    wanted = expected(clone(lists), step=123456.0, **scalars)
    on_device = {k: torch.tensor(v, dtype=torch.float64, device=device) for k, v in scalars.items()}
    run(lists, step=123456.0, **on_device)
    run(twin, step=123456.0, **scalars)
    for name in lists:
        assert torch.equal(flat(lists[name]), flat(twin[name])), name
    assert relative(flat(lists["ema"]), flat(wanted["ema"])) <= 1e-6


def test_the_first_step_is_bias_corrected(device, backend):
    lists = make(device, [(1000,)])
    lists["exp_avg"] = [torch.zeros_like(p) for p in lists["params"]]
    lists["exp_avg_sq"] = [torch.zeros_like(p) for p in lists["params"]]
    before = clone(lists)
    run(lists, step=0.0, lr=0.5)
    moved = flat(lists["params"]) - flat(before["params"])
    wanted = expected(before, step=0.0, lr=0.5)["params"]
    assert relative(moved, flat(wanted) - flat(before["params"])) <= 1e-6


@pytest.mark.parametrize("offset", [1, 4])
def test_views_at_any_address(device, backend, offset):
    """Views into flat buffers, as in distributed training; the elements around them stay."""
    size = 2 * module.CHUNK + 3
    lists = make(device, [(size,)])
    buffers = {}
    for name, (t,) in lists.items():
        buffers[name] = torch.full((size + 2 * offset,), 7.0, device=device)
        buffers[name][offset:-offset] = t
        lists[name] = [buffers[name][offset:-offset]]
    before = clone(lists)
    run(lists)
    wanted = expected(before)
    for name in ("params", "exp_avg", "exp_avg_sq", "ema"):
        assert relative(flat(lists[name]), flat(wanted[name])) <= TOLERANCE[backend]
        assert (buffers[name][:offset] == 7).all()
        assert (buffers[name][-offset:] == 7).all()


@pytest.mark.parametrize("forced", ["triton", "cuda"])
def test_unsupported_strides_and_dtypes_are_refused(device, forced, request, monkeypatch):
    if forced == "cuda":
        library = request.getfixturevalue("library")
        monkeypatch.setattr(_cuda, "library", lambda: library)
    conv = [(8, 6, 3, 3)]
    mixed = make(device, conv) | {"ema": make(device, conv, channels_last=True)["ema"]}
    gaps = {name: [t[0][:, ::2]] for name, t in make(device, [(8, 6)]).items()}
    transposed = make(device, [(8, 6)], compute_weights=torch.float16)
    transposed["compute_weights"] = [torch.zeros(6, 8, device=device, dtype=torch.float16).t()]
    half = make(device, conv) | {"compute_weights": [torch.zeros(8, 6, 3, 3, device=device)]}
    both = make(device, conv * 2, compute_weights=torch.float16)
    both["compute_weights"][1] = both["compute_weights"][1].bfloat16()
    with dispatch.forced(forced):
        for lists in (mixed, gaps, transposed, half, both):
            with pytest.raises(ValueError, match="adam_ema"):
                run(lists)


def test_the_pointer_table_is_cached_per_tensors(device):
    with dispatch.forced("triton"):
        lists = make(device, [(5000,), (3,)])
        count = len(module._tables)
        run(lists)
        run(lists)
        assert len(module._tables) == count + 1
        run(make(device, [(5000,), (3,)], seed=1))
        assert len(module._tables) == count + 2


@pytest.mark.parametrize(
    "change", ["storage", "object", "compute_weights", "order", "shorter", "lists"]
)
def test_a_cached_table_is_never_used_for_other_memory(device, change):
    """Update once, change the memory the table points to, and update again."""
    full = {
        name: t for name, (t,) in make(device, [(16, 16)], compute_weights=torch.float16).items()
    }
    lists = {name: [t.view(16, 16)] for name, t in full.items()}
    if change == "lists":
        lists["ema"] = []
    with dispatch.forced("triton"):
        run(lists)
        if change == "storage":  # new storage of the same tensor objects
            for (t,) in lists.values():
                t.data = t.data.clone()
        elif change == "object":  # like p.grad after zero_grad(set_to_none=True)
            lists["grads"] = [torch.randn(16, 16, device=device)]
        elif change == "compute_weights":
            weight = torch.full((16, 16), 77, dtype=torch.float16, device=device)
            lists["compute_weights"] = [weight]
        elif change == "order":  # same objects, same addresses
            lists["params"][0].t_()
            with pytest.raises(ValueError, match="strides"):
                run(lists)
            return
        elif change == "shorter":  # new objects at the addresses of freed ones
            lists = {name: [t[:6]] for name, t in full.items()}
        else:  # the same tensors in the same order, but in other lists
            moment, square = lists["exp_avg"], lists["exp_avg_sq"]
            lists |= {"exp_avg": [], "exp_avg_sq": moment, "ema": square}
            moment[0].abs_()
        beta1 = 0.9 if lists["exp_avg"] else 0.0
        wanted = expected(clone(lists), beta1=beta1)
        rest = {name: t[6:].clone() for name, t in full.items()}
        run(lists, beta1=beta1)
    for name in ("params", "exp_avg", "exp_avg_sq", "ema"):
        for updated, value in zip(lists[name], wanted[name], strict=False):
            assert relative(flat([updated]), flat([value])) <= 1e-6, name
    assert same(lists["compute_weights"][0], lists["params"][0].half())
    if change == "shorter":
        for name, t in full.items():
            assert same(t[6:], rest[name]), name


VIEWS = ("aten::permute", "aten::view", "aten::empty", "aten::detach")


class Operations(TorchDispatchMode):
    """Count operations other than views; refuse _foreach scalars of another dtype."""

    count = scalars = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        self.count += not name.startswith(VIEWS)
        if "_foreach" in name and isinstance(args[-1], torch.Tensor):
            assert args[-1].dtype == args[0][0].dtype, name
            self.scalars += 1
        return function(*args, **(kwargs or {}))


def test_eager_walks_whole_lists(device):
    """As many operations for 50 tensors as for five, and no foreach scalar of another dtype."""
    counts = set()
    for tensors in (5, 50):
        lists = make(
            device, [(8, 4, 3, 3)] * tensors, channels_last=True, compute_weights=torch.bfloat16
        )
        counts.add(_operations(lists, device))
    assert len(counts) == 1
    assert counts.pop() < 80


def _operations(lists, device) -> int:
    scalars = [torch.tensor(x, dtype=torch.float64, device=device) for x in (3.0, 1e-3, 0.97)]
    step, lr, ema_beta = scalars
    enabled = torch.tensor(True, device=device)
    names = ("params", "grads", "exp_avg", "exp_avg_sq", "ema", "compute_weights")
    with Operations() as seen:
        module.adam_ema_eager(
            *(lists[n] for n in names), step, enabled, lr, 0.9, 0.999, 1e-8, ema_beta
        )
    assert seen.scalars > 2
    return seen.count


def test_traced_without_a_break(device, backend):
    if backend != "eager":
        pytest.skip("tracing does not depend on the backend")
    lists = make(device, [(20,), (3, 4)], compute_weights=torch.bfloat16)
    lists["compute_weights"][0] = None
    twin = clone(lists)
    torch.compile(run, fullgraph=True, backend="eager")(lists)
    run(twin)
    assert torch.equal(flat(lists["params"]), flat(twin["params"]))


def test_a_library_of_another_interface_counts_as_not_built(library, monkeypatch, tmp_path):
    """As an editable install may have, until it is installed again."""
    (tmp_path / "sid_fast" / "kernels").mkdir(parents=True)
    link = tmp_path / "sid_fast" / "kernels" / "libsid_fast_kernels.so"
    link.symlink_to(library._name)
    monkeypatch.setattr(_cuda, "__file__", str(tmp_path / "_cuda.py"))
    monkeypatch.setattr(_cuda.sys, "path", [str(tmp_path)])
    assert _cuda.library.__wrapped__()._name == str(link)
    monkeypatch.setattr(_cuda, "INTERFACE", _cuda.INTERFACE - 1)
    assert _cuda.library.__wrapped__() is None


def test_the_library_declares_its_functions(library, device):
    """The host's function and, on a machine with a GPU, the device's."""
    assert library.sid_fast_adam_ema_host.restype is None
    if device.type == "cuda":
        assert library.sid_fast_adam_ema_cuda.restype is ctypes.c_int


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no CUDA compiler")
@pytest.mark.skipif(not shutil.which("cmake"), reason="no CMake")
@pytest.mark.slow
def test_cuda_library_compiles_for_the_three_architectures(tmp_path):
    path = build(tmp_path)
    assert _cuda.load(path).sid_fast_adam_ema_cuda.restype is ctypes.c_int
    for arch in (80, 90, 100):
        assert f"sm_{arch}".encode() in path.read_bytes()


def test_bytes_and_flop_equal_a_count_by_hand():
    """p, both moments and EMA are read and written, the gradient is read, the copy written."""
    assert module.bytes_moved(10, moment=True, ema=True, compute_weights=True) == 10 * (
        4 * 8 + 4 + 2
    )
    assert module.flop(10, moment=True, ema=False) == 10 * (4 + 6 + 3)
