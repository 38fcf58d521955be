"""Write networks for other programs: upstream's pickles, ONNX, torch.export.

ONNX and torch.export files hold a function with a dynamic batch size N: of a one-step generator
images(latents, class_labels), σ_init included; of a denoiser D(x, sigma, class_labels). Without
classes, class_labels is missing. Both are traced from the plain PyTorch form of the network (of an
EDM2 network, the network itself with eager kernels), on the CPU in float32, and compared with it
before the file gets its name.
"""

import contextlib
import importlib.util
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sid_fast import kernels
from sid_fast.errors import RunFailed, UserError
from sid_fast.io.atomic import atomic_path
from sid_fast.io.pickle_writer import write_pickle
from sid_fast.models import EDMNetwork, Network, NetworkConfig
from sid_fast.models.edm_unet import standalone
from sid_fast.models.registry import load_network

TOLERANCE = 1e-3  # of a written function's output, relative to the largest value or to 1
_TRACED = 2  # images; one would make the batch size a constant
_CHECKED = (1, 3)  # batch sizes that are compared; neither is the traced one
_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_ONNX_BYTES = 2**31 - 2**24  # weights in one file; the graph needs the rest
_Case = tuple[dict[str, torch.Tensor], torch.Tensor]  # inputs of the function, and its output


class OneStep(nn.Module):
    """Images of a one-step generator from latents z ~ N(0, I), [N, C, R, R]."""

    def __init__(self, net: nn.Module, init_sigma: float):
        super().__init__()
        self.net, self.init_sigma = net, init_sigma

    def forward(
        self, latents: torch.Tensor, class_labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return G(z) = D(σ_init·z; σ_init, c)."""
        sigma = latents.new_full((latents.shape[0],), self.init_sigma)
        return self.net(latents * self.init_sigma, sigma, class_labels)


class Denoiser(nn.Module):
    """D(x; σ, c) of noisy images x [N, C, R, R] and noise levels σ [N]."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(
        self, x: torch.Tensor, sigma: torch.Tensor, class_labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return D(x; σ, c)."""
        return self.net(x, sigma, class_labels)


def interface(config: NetworkConfig) -> str:
    """Describe the function in an ONNX or torch.export file: its inputs and its output."""
    image = f"[N, {config.channels}, {config.resolution}, {config.resolution}]"
    labels = f", class_labels [N, {config.label_dim}] (one-hot)" if config.label_dim else ""
    made = f"normalised latents {image}" if config.is_latent else f"images {image} in [-1, 1]"
    if config.init_sigma is None:
        return f"denoiser: x {image}, sigma [N]{labels} -> denoised {image}"
    return (
        f"one-step generator: latents {image}{labels} -> {made}; "
        f"it multiplies the latents by init_sigma = {config.init_sigma:g} itself"
    )


def plain_network(net: EDMNetwork, use_fp16: bool = False) -> standalone.EDMPrecond:
    """Return the plain PyTorch form of a network, frozen and in eval mode; shares its weights."""
    with torch.device("meta"):
        plain = standalone.EDMPrecond(**net.config.to_published(), use_fp16=use_fp16)
    plain.load_state_dict(net.state_dict(), assign=True)
    return plain.requires_grad_(False).eval()


def save_pickle(path: str | Path, net: EDMNetwork, use_fp16: bool = False) -> None:
    """Write a pickle that upstream's tools load, atomically, once it has been read back.

    Args:
        path: Of the pickle.
        net: The network.
        use_fp16: Upstream's tools compute in float16 on a GPU.
    """
    source = Path(standalone.__file__).read_text("utf-8")
    arguments = net.config.to_published() | {"use_fp16": use_fp16}
    with atomic_path(path) as temporary:
        with temporary.open("wb") as file:
            write_pickle(file, plain_network(net, use_fp16), source, arguments)
        written = load_network(temporary).state_dict()
        for name, value in net.state_dict().items():
            if not torch.equal(written[name], value):
                raise RunFailed(f"{path} is not written: {name} came back with other values")


def require_onnx() -> None:
    """Raise UserError if a package that save_onnx needs is not installed."""
    missing = [name for name in _ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"writing .onnx needs {', '.join(_ONNX_PACKAGES)}: pip install {' '.join(missing)}"
        )


@kernels.dispatch.forced("eager")
def save_onnx(path: str | Path, net: Network) -> float:
    """Write an ONNX file, atomically, once ONNX Runtime has run it.

    Returns:
        The largest difference of an output from PyTorch's.

    Raises:
        UserError: The weights are too many for an ONNX file, or make outputs that are not finite.
        RunFailed: The file computes something else.
    """
    import onnxruntime

    size = sum(value.nbytes for value in net.state_dict().values())
    if size > _ONNX_BYTES:
        raise UserError(
            f"{path} cannot be written: the weights have {size / 1e9:.1f} GB, and an .onnx file "
            "holds 2 GB: give NAME.pt2"
        )
    function = _function(net)
    cases = _cases(path, net.config, function)
    inputs = _inputs(net.config, _TRACED)
    traced = _trace(function, inputs)
    with _quiet():
        exported = torch.onnx.export(
            traced,
            input_names=list(inputs),
            output_names=["denoised" if net.config.init_sigma is None else "images"],
            dynamic_shapes=_dynamic(inputs),
            dynamo=True,
            verbose=False,
        )
    assert exported is not None
    exported.model.doc_string = interface(net.config)
    exported.model.metadata_props["sid_fast"] = _metadata(net.config)
    with atomic_path(path) as temporary:
        exported.save(temporary, external_data=False)
        session = onnxruntime.InferenceSession(temporary, providers=["CPUExecutionProvider"])

        def call(**tensors: torch.Tensor) -> torch.Tensor:
            (output,) = session.run(None, {k: v.numpy() for k, v in tensors.items()})
            return torch.from_numpy(np.asarray(output))

        return _compare(path, cases, call)


@kernels.dispatch.forced("eager")
def save_program(path: str | Path, net: Network) -> float:
    """Write a file of torch.export, atomically, once it has been loaded and run.

    Returns:
        The largest difference of an output from the network's.

    Raises:
        UserError: The weights make outputs that are not finite.
        RunFailed: The file computes something else.
    """
    function = _function(net)
    cases = _cases(path, net.config, function)
    traced = _trace(function, _inputs(net.config, _TRACED))
    with atomic_path(path) as temporary:
        with temporary.open("wb") as file:
            metadata = {"sid_fast.json": _metadata(net.config)}
            torch.export.save(traced, file, extra_files=metadata)
        with temporary.open("rb") as file:
            call = torch.export.load(file).module()
        return _compare(path, cases, call)


def _function(net: Network) -> nn.Module:
    plain = plain_network(net) if isinstance(net, EDMNetwork) else net
    init_sigma = net.config.init_sigma
    return (Denoiser(plain) if init_sigma is None else OneStep(plain, init_sigma)).eval()


def _trace(function: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.export.ExportedProgram:
    with _quiet():
        traced = torch.export.export(function, (), inputs, dynamic_shapes=_dynamic(inputs))
    for node in traced.graph.nodes:
        node.meta.pop("stack_trace", None)  # names folders of this machine
    return traced


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Drop what PyTorch's exporters say about themselves, such as that torchvision is missing."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _metadata(config: NetworkConfig) -> str:
    return json.dumps({"interface": interface(config), "config": config.to_dict()})


def _inputs(config: NetworkConfig, count: int) -> dict[str, torch.Tensor]:
    """Draw inputs of the function for `count` images, in the order of its arguments."""
    rng = torch.Generator().manual_seed(count)
    shape = count, config.channels, config.resolution, config.resolution
    noise = torch.randn(shape, generator=rng)
    if config.init_sigma is None:
        sigma = torch.logspace(-2.5, 1.9, count + 1)[1:]  # up to 80, where sampling starts
        inputs = {"x": noise * sigma[:, None, None, None], "sigma": sigma}
    else:
        inputs = {"latents": noise}
    if config.label_dim:
        classes = torch.randint(config.label_dim, (count,), generator=rng)
        inputs["class_labels"] = torch.eye(config.label_dim)[classes]
    return inputs


def _dynamic(inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    batch = torch.export.Dim("batch")
    return {name: {0: batch} for name in inputs}


@torch.no_grad()
def _cases(path: str | Path, config: NetworkConfig, function: nn.Module) -> list[_Case]:
    cases = []
    for count in _CHECKED:
        inputs = _inputs(config, count)
        cases.append((inputs, output := function(**inputs)))
        if not output.isfinite().all():
            raise UserError(
                f"{path} cannot be written: the network's images have NaN or infinite pixels: its "
                "weights are finite but too large; give another network, such as an earlier "
                "snapshot"
            )
    return cases


@torch.no_grad()
def _compare(path: str | Path, cases: list[_Case], call: Callable[..., torch.Tensor]) -> float:
    """Return the largest difference of `call`'s outputs from those of the cases."""
    largest = 0.0
    for inputs, expected in cases:
        difference = float((call(**inputs) - expected).abs().max())
        if not difference <= TOLERANCE * max(1, float(expected.abs().max())):
            raise RunFailed(
                f"{path} is not written: its output for {len(expected)} images differs from "
                f"PyTorch's by up to {difference:.2g}: try other versions of torch, onnxscript "
                "and onnxruntime, and report it"
            )
        largest = max(largest, difference)
    return largest
