"""Reading the golden data."""

import os
from pathlib import Path

import numpy as np
import torch

from sid_fast import Draw, Settings, SiDASettings, losses, noise
from sid_fast.data.images import to_float
from sid_fast.models import Network
from sid_fast.models.edm_unet.layers import BlockedRows

SHARED = Path(os.environ.get("SID_FAST_SHARED", Path(__file__).parents[3] / "shared"))
NETWORKS = ["ddpmpp_uncond", "ddpmpp_cond", "ncsnpp_uncond", "adm_cond"]
TOLERANCE = 1e-4  # relative in norm, of values and gradients
TRAJECTORY_TOLERANCE = 1e-3


def read(path: Path) -> dict[str, torch.Tensor]:
    with np.load(path) as data:
        return {name: torch.from_numpy(np.asarray(data[name])) for name in data}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """‖found − expected‖ / ‖expected‖; NaN never passes a comparison."""
    return float((found.detach().double() - expected.double()).norm() / expected.double().norm())


def collect_gradients(net: Network) -> None:
    """Turn the gradients of a network's copies into its parameters', as an update does."""
    for leaf in net.compute_copies:
        ((_, (p,)),) = leaf.sources
        p.grad = None if leaf.tensor.grad is None else leaf.tensor.grad.float()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in net.parameters()]
    net.backward_through_copies(grads)


def check_gradients(net: Network, data: dict[str, torch.Tensor], prefix: str) -> None:
    """Compare the gradients of all parameters with PREFIX.NAME, _head and _norm."""
    collect_gradients(net)
    checked = 0
    for name, p in net.named_parameters():
        found = p.grad
        layer = net.get_submodule(name.rpartition(".")[0])
        if isinstance(layer, BlockedRows) and found is not None:
            found = found[layer.order().argsort()]
        if (expected := data.get(f"{prefix}.{name}")) is None:
            expected = data.get(f"{prefix}_head.{name}")
            if expected is None:
                assert found is None or not found.any(), f"{name}: golden has no gradient"
                continue
            assert found is not None, name
            norm = float(data[f"{prefix}_norm.{name}"])
            assert abs(float(found.norm()) - norm) <= TOLERANCE * norm, name
            found = found.flatten()[:512]
        if float(expected.norm()) == 0:  # zero augmentation labels, or none
            assert found is None or not found.any(), name
        else:
            assert found is not None, name
            assert relative(found, expected) <= TOLERANCE, name
        checked += 1
    assert checked > 50


def check_sida_losses(teacher: Network, fake_score: Network, data: dict[str, torch.Tensor]) -> None:
    """Compare both of SiDA's losses and their gradients with NAME.sida_loss.npz."""
    labels, batch = data.get("class_labels"), len(data["y"])
    y = data["y"].requires_grad_(True)
    found = losses.sida_generator_loss(
        teacher, fake_score, y, data["g_sigma"], data["g_noise"], float(data["alpha"]), labels
    )
    assert relative(found.loss, data["g_sid_map"].sum((1, 2, 3))) <= TOLERANCE
    assert relative(found.adversarial, data["g_gan_map"].flatten()) <= TOLERANCE
    s_sid = float(data["lsg"]) * found.loss.sum() / batch
    s_gan = float(data["lsg_gan"]) * y[0].numel() * found.adversarial.sum() / batch
    assert relative(s_sid, data["g_sid_scaled"]) <= TOLERANCE
    assert relative(s_gan, data["g_gan_scaled"]) <= TOLERANCE
    (grad,) = torch.autograd.grad(s_gan, y, retain_graph=True)
    assert relative(grad, data["g_grad_y_gan"]) <= TOLERANCE
    (grad,) = torch.autograd.grad(0.5 * s_sid + 0.5 * s_gan, y)
    assert relative(grad, data["g_grad_y_total"]) <= TOLERANCE

    fake_score.requires_grad_(True)
    found = losses.sida_fake_score_loss(
        fake_score, y, data["real"], data["f_sigma"], data["f_noise"], labels
    )
    assert relative(found.loss, data["f_score_map"].sum((1, 2, 3))) <= TOLERANCE
    assert relative(found.discriminator, data["f_disc_map"].flatten()) <= TOLERANCE
    total = float(data["ls"]) * found.loss + float(data["lsd"]) * found.discriminator
    (total.sum() / batch).backward()
    check_gradients(fake_score, data, "f_grad")


def golden_settings(data) -> Settings:
    """Settings of a recorded trajectory, of SiD or of SiDA."""
    if "lsd" not in data:
        return Settings(**_sid_settings(data))
    micro_batch = int(data["batch"]) // int(data["accumulation"])
    return SiDASettings(
        **_sid_settings(data),
        discriminator_loss_scale=float(data["lsd"]),
        adversarial_loss_scale=float(data["lsg_gan"]),
        adversarial_group=micro_batch,
        generator_start_kimg=int(data["generator_start_images"]) / 1000,
        adversarial_start_kimg=int(data["adversarial_start_images"]) / 1000,
        fake_grad_clip=float(data["clip"]),
    )


def _sid_settings(data) -> dict:
    return dict(
        alpha=float(data["alpha"]),
        tmax=int(data["tmax"]),
        init_sigma=float(data["init_sigma"]),
        fake_lr=float(data["lr"]),
        generator_lr=float(data["glr"]),
        fake_beta1=float(data["fake_beta1"]),
        generator_beta1=float(data["g_beta1"]),
        beta2=float(data["beta2"]),
        eps=float(data["eps"]),
        ema_halflife_kimg=float(data["ema_halflife_kimg"]),
        ema_rampup_ratio=float(data["ema_rampup_ratio"]),
        fake_loss_scale=float(data["ls"]),
        generator_loss_scale=float(data["lsg"]),
        batch_size=int(data["batch"]),
        micro_batch=int(data["batch"]) // int(data["accumulation"]),
    )


def golden_draws(data, step: int) -> dict[str, list[Draw]]:
    def draw(phase: str, i: int) -> Draw:
        values = {
            name: data.get(f"step{step}.{phase}.round{i}.{name}")
            for name in ("z", "rnd_normal", "rand_t", "noise", "class_labels", "real_uint8")
        }
        sigma = (
            noise.fake_score_sigma(values["rnd_normal"])
            if phase == "fake"
            else noise.generator_sigma(values["rand_t"] * float(data["tmax"]) / 1000)
        )
        real = values["real_uint8"]
        return Draw(
            values["z"], sigma, values["noise"], values["class_labels"],
            real=None if real is None else to_float(real),
        )  # fmt: skip

    rounds = range(int(data["accumulation"]))
    return {
        "fake": [draw("fake", i) for i in rounds],
        "generator": [draw("g", i) for i in rounds],
    }


def trajectory_error(data, start, net, name: str) -> float:
    """‖p − p_golden‖ / ‖p_golden − p_start‖ over all the elements recorded of one network."""
    error = moved = 0.0
    state = net.state_dict()  # in the published order
    for key, p in ((key, state[key]) for key, _ in net.named_parameters()):
        if (expected := data.get(f"final.{name}.{key}")) is None:
            expected = data[f"final_head.{name}.{key}"]
        expected = expected.double().flatten()
        head = slice(None, len(expected))
        error += float((p.detach().double().flatten()[head] - expected).square().sum())
        moved += float((start[key].double().flatten()[head] - expected).square().sum())
    return (error / moved) ** 0.5
