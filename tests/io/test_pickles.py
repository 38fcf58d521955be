"""Published pickles: what is read, what is refused, and that their code never runs."""

import collections
import copyreg
import pickle
import struct
import sys
import time
import types

import numpy as np
import pytest
import torch

from sid_fast.errors import UserError
from sid_fast.io import pickles
from sid_fast.io.pickles import read_pickle

NETWORKS = ["ddpmpp_uncond", "ddpmpp_cond", "ncsnpp_uncond", "adm_cond"]


# --- the golden files


@pytest.mark.parametrize("name", NETWORKS)
def test_golden_networks(golden, name):
    net, fake = (read_pickle(golden / f"{name}{kind}.pkl") for kind in ("", ".fake"))
    assert net.class_name == "EDMPrecond"
    assert net.init_kwargs["img_resolution"] == 16
    assert net.init_kwargs["img_channels"] == 3
    assert net.init_kwargs == fake.init_kwargs
    assert list(net.state) == list(fake.state)
    assert not torch.equal(
        net.state["model.enc.16x16_conv.weight"], fake.state["model.enc.16x16_conv.weight"]
    )
    for tensor in net.state.values():
        assert tensor.dtype == torch.float32
        assert tensor.is_contiguous()

    forward = np.load(golden / f"{name}.forward.npz")
    parameters = {key.partition(".")[2] for key in forward.files if "." in key}
    buffers = set(net.state) - parameters
    assert parameters - set(net.state) == set()
    assert {key.rpartition(".")[2] for key in buffers} <= {"resample_filter", "freqs"}
    assert ("model.map_noise.freqs" in buffers) == (name == "ncsnpp_uncond")
    for key in forward.files:
        if key.startswith("grad."):
            assert forward[key].shape == net.state[key.removeprefix("grad.")].shape


# --- the published layout, made here


@pytest.fixture
def fake(monkeypatch):
    """Makes importable names that a pickle may then refer to."""

    def make(module, name, value=None):
        if value is None:
            value = types.FunctionType((lambda *args: None).__code__, {})
        value.__module__, value.__qualname__, value.__name__ = module, name, name
        for depth in range(1, module.count(".") + 2):  # dnnlib, then dnnlib.util
            parent = ".".join(module.split(".")[:depth])
            if parent not in sys.modules:
                monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
        monkeypatch.setattr(sys.modules[module], name, value, raising=False)
        return value

    return make


class Call:
    """Pickles as a call of `function` with `args`, then BUILD with `state`."""

    def __init__(self, function, *args, state=None):
        self.reduced = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.reduced


@pytest.fixture
def module(fake):
    """Something that pickles as a persistent module of the published code."""
    rebuild = fake("torch_utils.persistence", "_reconstruct_persistent_obj")

    def make(class_name="Linear", parameters=(), buffers=(), modules=(), **fields):
        state = {
            "training": False,
            "_parameters": dict(parameters),
            "_buffers": dict(buffers),
            "_modules": dict(modules),
            "_non_persistent_buffers_set": set(),
            "_forward_hooks": collections.OrderedDict(),
            "_init_args": (),
            "_init_kwargs": {},
        }
        meta = {
            "type": "class",
            "version": 6,
            "module_src": "raise SystemExit('the source was run')",
            "class_name": class_name,
            "state": {**state, **fields},
        }
        return Call(rebuild, meta)

    return make


def write(path, data):
    path.write_bytes(data if isinstance(data, bytes) else pickle.dumps(data, protocol=4))
    return path


def refusal(path, data):
    """What reading says of the file, without its name; the form is checked."""
    with pytest.raises(UserError) as caught:
        read_pickle(write(path, data))
    message = str(caught.value)
    assert message.startswith(f"{path} ")
    assert "\n" not in message
    return message.removeprefix(str(path))


def test_published_layout(module, fake, tmp_path):
    class EasyDict(dict):
        pass

    easydict = fake("dnnlib.util", "EasyDict", EasyDict)
    conv, norm = torch.randn(4, 3, 3, 3), torch.randn(4).half()
    table = torch.randn(6, 5).t()[1:3]  # a view with an offset and odd strides
    blocks = torch.nn.ModuleDict()
    blocks._modules["8x8_conv"] = module(
        parameters={
            "weight": torch.nn.Parameter(conv.to(memory_format=torch.channels_last)),
            "bias": None,
        },
        buffers={"resample_filter": torch.ones(2, 2), "scratch": torch.ones(9), "none": None},
        _non_persistent_buffers_set={"scratch"},
    )
    blocks._modules["8x8_skip"] = None
    kwargs = easydict(
        img_resolution=np.int64(8),
        dropout=np.float32(0.25),
        use_fp16=np.bool_(True),
        augment_dim=None,
        model_type="SongUNet",
        channel_mult=(1, 2, np.int32(2)),
        resample_filter=[1, 3, 3, 1],
    )
    unet = module(
        "SongUNet",
        parameters={"norm": torch.nn.Parameter(norm)},
        buffers={"freqs": table},
        modules={"enc": blocks, "dec": torch.nn.Sequential()},
    )
    data = {
        "ema": module("EDMPrecond", modules={"model": unet}, _init_kwargs=kwargs),
        "loss_fn": module("EDMLoss", P_mean=np.float64(-1.2)),
        "augment_pipe": module("AugmentPipe", wavelets=np.arange(12.0)),
        "dataset_kwargs": easydict(path="/data/cifar10.zip", xflip=False),
    }
    net = read_pickle(write(tmp_path / "net.pkl", data))

    assert net.class_name == "EDMPrecond"
    assert net.init_kwargs == {
        "img_resolution": 8,
        "dropout": 0.25,
        "use_fp16": True,
        "augment_dim": None,
        "model_type": "SongUNet",
        "channel_mult": [1, 2, 2],
        "resample_filter": [1, 3, 3, 1],
    }
    flat = [item for value in net.init_kwargs.values() for item in np.atleast_1d(value).tolist()]
    assert {type(item) for item in flat} <= {int, float, bool, str, type(None)}
    expected = {
        "model.norm": norm.float(),
        "model.freqs": table,
        "model.enc.8x8_conv.weight": conv,
        "model.enc.8x8_conv.resample_filter": torch.ones(2, 2),
    }
    assert list(net.state) == list(expected)
    for name, tensor in expected.items():
        found = net.state[name]
        assert torch.equal(found, tensor)
        assert found.dtype == torch.float32
        assert found.is_contiguous()
        assert not found.requires_grad


@pytest.mark.parametrize("core", ["core", "_core"])
def test_numpy_scalars_of_either_numpy(module, fake, tmp_path, core):
    numpy1 = fake(f"numpy.{core}.multiarray", "scalar")
    values = [np.float64(1.5), np.array([-7], ">i4")[0], np.uint8(255)]
    scalars = [Call(numpy1, v.dtype, v.tobytes()) for v in values]
    scalars[1] = Call(numpy1, np.dtype(">i4"), np.array(-7, ">i4").tobytes())
    net = read_pickle(write(tmp_path / "a.pkl", {"ema": module(_init_kwargs={"values": scalars})}))
    assert net.init_kwargs == {"values": [1.5, -7, 255]}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_storage_types(module, tmp_path, dtype):
    tensor = torch.randn(7).to(dtype)
    net = read_pickle(write(tmp_path / "a.pkl", {"ema": module(parameters={"a": tensor})}))
    assert torch.equal(net.state["a"], tensor.float())


# --- files that are no such network


def test_other_files(module, tmp_path):
    path = tmp_path / "net.pkl"
    assert "no entry 'ema'" in refusal(path, {"G": 1})
    assert "no entry 'ema'" in refusal(path, [1, 2])
    assert "'ema' is not a network" in refusal(path, {"ema": {"weight": torch.ones(2)}})
    assert "'ema' is not a network" in refusal(path, {"ema": None})
    assert "positional arguments" in refusal(path, {"ema": module(_init_args=(32, 3))})
    assert "hold a dict" in refusal(path, {"ema": module(_init_kwargs={"a": {"b": 1}})})
    assert "hold a list" in refusal(path, {"ema": module(_init_kwargs={"a": [[1]]})})
    assert "network module should" in refusal(path, {"ema": module(modules={"a": 3})})
    assert "a tensor should" in refusal(path, {"ema": module(parameters={"a": 3})})
    assert "torch.LongStorage" in refusal(path, {"ema": module(buffers={"a": torch.arange(3)})})
    assert "cut short" in refusal(path, b"")
    for junk in b"hello\n", b"<!DOCTYPE html>", b"PK\x03\x04", b"\x89PNG\r\n", bytes(1000):
        assert "network pickle" in (text := refusal(path, junk))
        assert "damaged" in text


def test_unreadable(tmp_path):
    with pytest.raises(UserError, match=r"none\.pkl does not exist"):
        read_pickle(tmp_path / "none.pkl")
    with pytest.raises(UserError, match="is a folder"):
        read_pickle(tmp_path)


def test_truncated_anywhere(module, tmp_path):
    parameters = {"a": torch.nn.Parameter(torch.randn(50)), "b": torch.randn(50)}
    data = pickle.dumps({"ema": module(parameters=parameters)})
    for keep in range(0, len(data), 7):
        assert (
            "cut short" in (text := refusal(tmp_path / "a.pkl", data[:keep])) or "damaged" in text
        )


def test_any_damage_is_a_user_error(module, tmp_path):
    path = tmp_path / "a.pkl"
    data = pickle.dumps({"ema": module(parameters={"a": torch.nn.Parameter(torch.randn(2))})})
    for seed in range(1000):
        rng = np.random.default_rng(seed)
        damaged = bytearray(data)
        for position in rng.integers(len(data), size=3):
            damaged[position] = rng.integers(256)
        path.write_bytes(damaged)
        message = str(path)
        try:
            read_pickle(path)
        except UserError as error:
            message = str(error)
        assert message.startswith(str(path))
        assert "\n" not in message


# --- files that attack


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def nested(inner):
    """A network whose weight has the pickle `inner` where its storage should be."""
    storage = (
        b"ctorch.storage\n_load_from_bytes\n(B" + struct.pack("<I", len(inner)) + inner + b"tR"
    )
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00(K\x01t(K\x01t\x89NtR"
    fields = b"".join(
        text(key) + value + b"s"
        for key, value in {
            "_parameters": b"}X\x01\x00\x00\x00w" + tensor + b"s",
            "_buffers": b"}",
            "_modules": b"}",
            "_init_args": b"(t",
            "_init_kwargs": b"}",
        }.items()
    )
    meta = (
        b"}" + text("class_name") + text("EDMPrecond") + b"s" + text("state") + b"}" + fields + b"s"
    )
    network = b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n(" + meta + b"tR"
    return b"\x80\x04}" + text("ema") + network + b"s."


SYSTEM = {
    "GLOBAL": (b"cos\nsystem\n(RUNtR.", "os.system"),
    "INST": (b"(RUNios\nsystem\n.", "os.system"),
    "OBJ": (b"(cos\nsystem\nRUNo.", "os.system"),
    "STACK_GLOBAL": (text("posix") + text("system") + b"\x93RUN\x85R.", "posix.system"),
    "dotted name": (
        text("torch.serialization") + text("os.system") + b"\x93RUN\x85R.",
        "torch.serialization.os.system",
    ),
    "getattr": (
        b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n(" + text("os") + b"tR"
        + text("system") + b"tR(RUNtR.",
        "builtins.getattr",
    ),
    "eval": (
        b"cbuiltins\neval\n(" + text("__import__('os').system") + b"tR(RUNtR.",
        "builtins.eval",
    ),
}  # fmt: skip


@pytest.mark.parametrize("depth", ["outside", "in ema", "in a storage"])
@pytest.mark.parametrize("kind", SYSTEM)
def test_nothing_is_run(tmp_path, kind, depth):
    """Each payload is shown to be live afterwards, by pickle itself."""
    marker = tmp_path / "marker"
    payload, name = SYSTEM[kind]
    payload = payload.replace(b"RUN", text(f"touch {marker}"))
    data = {
        "outside": b"\x80\x04" + payload,
        "in ema": b"\x80\x04}" + text("ema") + payload[:-1] + b"s.",
        "in a storage": nested(b"\x80\x04" + payload),
    }[depth]
    assert f"it names '{name}'" in refusal(tmp_path / "a.pkl", data)
    assert not marker.exists()
    pickle.loads(b"\x80\x04" + payload)
    assert marker.exists()


def test_extension_codes(tmp_path):
    marker = tmp_path / "marker"
    payload = b"\x80\x04\x82\xf0(" + text(f"touch {marker}") + b"tR."
    refusal(tmp_path / "a.pkl", payload)  # not registered
    copyreg.add_extension("posix", "system", 0xF0)
    try:
        refusal(tmp_path / "a.pkl", payload)
        assert not marker.exists()
        pickle.loads(payload)  # which also caches the function under its code
        assert marker.exists()
        marker.unlink()
        refusal(tmp_path / "a.pkl", payload)
        assert not marker.exists()
    finally:
        copyreg.remove_extension("posix", "system", 0xF0)
        copyreg._extension_cache.pop(0xF0, None)


@pytest.mark.parametrize("name", [" ".join(key) for key in pickles._GLOBALS])
def test_attributes_of_allowed_names_cannot_be_set(tmp_path, name):
    module, attribute = name.split()
    target = pickles._GLOBALS[module, attribute]
    before = dict(vars(target)) if isinstance(target, type) else repr(target)
    function = f"c{module}\n{attribute}\n".encode()
    for state in (
        b"(N}" + text("__new__") + b"I1\nst",
        b"}" + text("__new__") + b"I1\ns",
        b"(N}" + text("__class__") + function + b"st",
    ):
        for instance in b"", b")R", b")\x81":
            refusal(tmp_path / "a.pkl", b"\x80\x04" + function + instance + state + b"b.")
    assert before == (dict(vars(target)) if isinstance(target, type) else repr(target))


def test_numpy_objects_are_not_made(module, fake, tmp_path):
    scalar = fake("numpy.core.multiarray", "scalar")
    for code in "O8", "V8", "U2", "M8", "f8,O8", "c16":
        dtype = Call(fake("numpy", "dtype"), code, False, True, state=(3, "<", None, None))
        data = {"ema": module(_init_kwargs={"a": Call(scalar, dtype, bytes(16))})}
        assert "not a plain value" in refusal(tmp_path / "a.pkl", data)


def test_nothing_is_imported(tmp_path):
    sys.modules.pop("antigravity", None)
    refusal(tmp_path / "a.pkl", b"cantigravity\nx\n.")
    assert "antigravity" not in sys.modules


# --- files that would fill the memory


def parameter(module, storage, offset, size, stride):
    rebuild = Call(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, {})
    return {"ema": module(parameters={"a": rebuild})}


def test_shapes_beyond_the_storage(module, tmp_path):
    storage = torch.ones(6)._typed_storage()
    net = read_pickle(write(tmp_path / "a.pkl", parameter(module, storage, 2, (2, 2), (2, 1))))
    assert torch.equal(net.state["a"], torch.ones(2, 2))
    for offset, size, stride in [
        (0, (7,), (0,)),
        (0, (1 << 40,), (0,)),
        (0, (1 << 40, 1 << 40), (1, 1)),
        (0, (7,), (1,)),
        (1, (6,), (1,)),
        (0, (2,), (6,)),
        (-1, (2,), (1,)),
        (3, (2,), (-1,)),
        (0, (-2, -2), (1, 1)),
        (0, (2.0,), (1,)),
        (0, ("a",), (1,)),
        (0, (2,), (1, 1)),
    ]:
        refusal(tmp_path / "a.pkl", parameter(module, storage, offset, size, stride))


def test_storages_that_declare_more_than_they_hold(module, tmp_path):
    data = pickle.dumps({"ema": module(parameters={"a": torch.full([50], 7.0)})})
    count, one = (50).to_bytes(8, "little"), struct.pack("<f", 7)
    assert data.count(count + one) == 1
    for lie in 51, 1 << 40, (1 << 64) - 1:
        lied = data.replace(count + one, lie.to_bytes(8, "little") + one)
        assert "cut short" in (text := refusal(tmp_path / "a.pkl", lied)) or "damaged" in text


def test_shared_parts_do_not_unfold(module, tmp_path):
    block = module()
    for _ in range(14):  # 2^14 names if followed
        block = module(modules={"a": block, "b": block})
    assert "are shared" in refusal(tmp_path / "a.pkl", {"ema": block})

    storage = torch.ones(1000)._typed_storage()
    rebuild = [
        Call(torch._utils._rebuild_tensor_v2, storage, 0, (1000,), (1,), False, {}) for _ in "ab"
    ]
    assert "are shared" in refusal(
        tmp_path / "a.pkl", {"ema": module(parameters=dict(zip("ab", rebuild, strict=True)))}
    )
    cycle = module()
    cycle.reduced[1][0]["state"]["_modules"]["self"] = cycle
    assert "are shared" in refusal(tmp_path / "a.pkl", {"ema": cycle})


@pytest.mark.parametrize(
    "opcode",
    [
        b"r\xff\xff\xff\x03",  # LONG_BINPUT, of which C's unpickler makes a table
        b"\x96" + (1 << 30).to_bytes(8, "little"),  # BYTEARRAY8, which Python's fills
        b"\x8e" + (1 << 62).to_bytes(8, "little"),  # BINBYTES8
        b"\x8d" + (1 << 62).to_bytes(8, "little"),  # BINUNICODE8
        b"\x95" + (1 << 62).to_bytes(8, "little"),  # FRAME
        b"\x8b\xff\xff\xff\x7f",  # LONG4
    ],
)
def test_declared_sizes_are_not_allocated(tmp_path, opcode):
    resource = pytest.importorskip("resource")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refusal(tmp_path / "a.pkl", b"\x80\x05}" + opcode + b".")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


def test_deep_nesting(tmp_path):
    assert "ema" in refusal(tmp_path / "a.pkl", b"]" * 200_000 + b"a" * 199_999 + b".")


@pytest.mark.parametrize("store", [b"Ns.", b"(", b"\x91"], ids=["setitem", "setitems", "frozenset"])
def test_a_key_of_many_levels_does_not_end_the_process(tmp_path, store):
    deep = b")" + b"\x85" * 400_000
    body = {
        b"Ns.": b"}" + deep + b"Ns.",
        b"(": b"}(" + deep + b"Nu.",
        b"\x91": b"(" + deep + b"\x91.",
    }[store]
    path = tmp_path / "deep.pkl"
    path.write_bytes(b"\x80\x04" + body)
    with pytest.raises(UserError, match="not plain text"):
        read_pickle(path)


# --- files that stall


def with_kwargs(value):
    """A network with one argument, `a`, that has the pickle opcodes `value`."""
    fields = {"_parameters": b"}", "_buffers": b"}", "_modules": b"}", "_init_args": b")"}
    fields["_init_kwargs"] = b"}" + text("a") + value + b"s"
    state = b"}" + b"".join(text(k) + v + b"s" for k, v in fields.items())
    meta = b"}" + text("class_name") + text("EDMPrecond") + b"s" + text("state") + state + b"s"
    network = b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n(" + meta + b"tR"
    return b"\x80\x04}" + text("ema") + network + b"s."


# A list with the last one twice, 60 times over: 2^60 lists if they are followed.
LISTS = b"]q\x00" + b"".join(b"0](h%ch%ceq%c" % (i, i, i + 1) for i in range(60))
DTYPE = b"cnumpy\ndtype\n(" + text("f4") + b"\x89\x88tR(K\x03"
COLLIDING = [k * (2**61 - 1) for k in range(30_000)]  # whose hash is 0
PARAMETER = b"ctorch._utils\n_rebuild_parameter\n"
STALLS = {  # an argument of the network, and what is said of it
    "byte order": (
        b"cnumpy.core.multiarray\nscalar\n(" + DTYPE + LISTS + b"NtbC\x04abcdtR",
        "not a plain value",
    ),
    "kind": (
        b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(" + LISTS + b"tR(K\x03"
        + text("<") + b"NtbC\x04abcdtR",
        "not a plain value",
    ),
    "argument": (LISTS, "hold a list"),
    "long list": (b"](" + b"N" * 100_000 + b"e", "a list that is too long"),
    "integer": (b"\x8a\xff" + b"\x7f" * 255, "hold a int"),
    "long integer": (b"\x8b" + struct.pack("<I", 10**6) + b"\x7f" * 10**6, "byte 0x8b stands"),
    "decimal integer": (b"L" + b"9" * 100_000 + b"L\n", "byte 0x4c stands"),
    "integer keys": (
        b"}(" + b"".join(b"\x8a\x0b" + k.to_bytes(11, "little") + b"N" for k in COLLIDING) + b"u",
        "not plain text",
    ),
    "memo keys": (b"N" + b"".join(b"p%d\n" % k for k in COLLIDING), "byte 0x70 stands"),
    "calls with text": (
        text("x" * 100_000) + b"\x940" + PARAMETER + b"\x94" + b"h\x00R0h\x01" * 10_000,
        "arguments that such a file does not need",
    ),
    "calls with a tuple": (
        b"(" + b"N" * 100_000 + b"t\x940" + PARAMETER + b"\x94" + b"h\x00R0h\x01" * 10_000,
        "arguments that such a file does not need",
    ),
    "objects": (b"]" * 3_000_000, "far more objects"),
}  # fmt: skip


@pytest.mark.parametrize("name", STALLS)
def test_small_files_end_soon_in_little_memory(tmp_path, name):
    resource = pytest.importorskip("resource")
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    argument, words = STALLS[name]
    message = refusal(tmp_path / "a.pkl", with_kwargs(argument))
    assert words in message
    assert time.perf_counter() - began < 20
    assert len(message) < 500
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # KiB


@pytest.mark.parametrize("shape", [(10**1000,) * 8, (2**62,) * 60, (2**62,) * 8, [[1]], (True,)])
def test_shapes_of_huge_integers(module, tmp_path, shape):
    storage = torch.ones(6)._typed_storage()
    message = refusal(tmp_path / "a.pkl", parameter(module, storage, 0, shape, (1,) * len(shape)))
    assert "shape of a tensor" in message or "no meaning" in message
    assert len(message) < 300


def test_shared_names_do_not_unfold(module, tmp_path):
    """A thousand modules with one dict of parameters, and names of a megabyte."""
    shared = {str(i): None for i in range(1000)}
    modules = {str(i): module() for i in range(1000)}
    for m in modules.values():
        m.reduced[1][0]["state"]["_parameters"] = shared
    assert "are shared" in refusal(tmp_path / "a.pkl", {"ema": module(modules=modules)})
    long = {"x" * 10**6: torch.ones(1)}
    assert "more than 200 characters" in refusal(
        tmp_path / "a.pkl", {"ema": module(parameters=long)}
    )


# --- protocols


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_that_upstream_could_write(module, tmp_path, protocol):
    weight = torch.randn(3, 2)
    scratch = torch.ones(1)
    net = module(
        parameters={"weight": torch.nn.Parameter(weight)},
        buffers={"kept": torch.zeros(2), "scratch": scratch},
        _non_persistent_buffers_set={"scratch"},
        _init_kwargs={"img_resolution": 8, "dropout": np.float64(0.25)},
    )
    path = tmp_path / "net.pkl"
    path.write_bytes(pickle.dumps({"ema": net}, protocol))
    found = read_pickle(path)
    assert found.init_kwargs == {"img_resolution": 8, "dropout": 0.25}
    assert list(found.state) == ["weight", "kept"]
    assert torch.equal(found.state["weight"], weight)


@pytest.mark.parametrize("protocol", [2, 3])
def test_genuine_files_of_protocols_2_and_3(golden, protocol):
    case = golden.parent / "cases" / "11-pickle-protocol-2-3" / f"ddpmpp-proto{protocol}-tiny.pkl"
    net = read_pickle(case)
    assert net.class_name == "EDMPrecond"
    assert len(net.state) == 146
