"""Configurations of EDM2's published pickles."""

from typing import Any

from sid_fast.errors import UserError
from sid_fast.io.untrusted import brief
from sid_fast.models.edm2.config import LATENT_CHANNELS, EDM2Config

_NAMES = {
    "img_resolution": "resolution",
    "img_channels": "channels",
    "label_dim": "label_dim",
    "model_channels": "model_channels",
    "channel_mult": "channel_mult",
    "num_blocks": "num_blocks",
    "attn_resolutions": "attention_resolutions",
    "dropout": "dropout",
    "sigma_data": "sigma_data",
    "logvar_channels": "logvar_channels",
}
_REQUIRED = ("img_resolution", "img_channels", "label_dim", "model_channels")
# Arguments with one supported value.
_FIXED = {
    "label_balance": 0.5,
    "concat_balance": 0.5,
    "res_balance": 0.3,
    "attn_balance": 0.3,
    "clip_act": 256,
    "resample_filter": [1, 1],
}


def config_of(kwargs: dict[str, Any], has_logvar: bool) -> EDM2Config:
    """Convert upstream's constructor arguments, as stored in a pickle.

    Args:
        kwargs: The arguments.
        has_logvar: Whether the pickle holds the weights of a log-variance head.

    Raises:
        UserError: The network is of another kind, or only guides another network.
    """
    kwargs = {name: value for name, value in kwargs.items() if name != "use_fp16"}
    if missing := [name for name in _REQUIRED if name not in kwargs]:
        raise UserError(f"network: the EDM2 network in it lacks the argument {missing[0]}")
    for field, only in _FIXED.items():
        value = kwargs.pop(field, only)
        if value != only:
            raise UserError(f"network: {field}={brief(value)} is not supported; {only!r} is")
    if unknown := sorted(set(kwargs) - set(_NAMES)):
        field = unknown[0]
        raise UserError(f"network: {field[:60]}={brief(kwargs[field])} is not supported")
    if kwargs["label_dim"] == 0 and kwargs["img_channels"] == LATENT_CHANNELS:
        raise UserError(
            "network: label_dim=0: an unconditional EDM2 network of latents, which is published "
            "only to guide a class-conditional one: give that one's file"
        )
    values = {_NAMES[name]: value for name, value in kwargs.items()}
    if not has_logvar:
        values["logvar_channels"] = 0
    return EDM2Config.from_dict(values)
