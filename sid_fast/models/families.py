"""The network families: their configurations, networks and published pickles."""

import dataclasses
from collections.abc import Callable
from typing import Any

from sid_fast.errors import UserError
from sid_fast.io.pickles import PickledNetwork
from sid_fast.io.untrusted import brief
from sid_fast.models import EDM2Config, EDM2Network, EDMNetwork, Network, NetworkConfig
from sid_fast.models.edm2.pickle import config_of


@dataclasses.dataclass(frozen=True)
class Family:
    """A network family.

    Attributes:
        config: Class of its configurations.
        network: Class of its networks, built from a configuration.
        published: Class name of its networks in upstream's pickles.
        from_pickle: Reads the configuration of such a network.
    """

    config: type[NetworkConfig]
    network: Callable[[Any], Network]
    published: str
    from_pickle: Callable[[PickledNetwork], NetworkConfig]


FAMILIES = (
    Family(
        NetworkConfig, EDMNetwork, "EDMPrecond",
        lambda p: NetworkConfig.from_published(p.class_name, p.init_kwargs),
    ),
    Family(
        EDM2Config, EDM2Network, "Precond",
        lambda p: config_of(p.init_kwargs, has_logvar="logvar_linear.weight" in p.state),
    ),
)  # fmt: skip


def build_network(config: NetworkConfig) -> Network:
    """Build the network of a configuration, with initial weights."""
    (family,) = (family for family in FAMILIES if type(config) is family.config)
    return family.network(config)


def read_config(values: dict[str, Any]) -> NetworkConfig:
    """Rebuild a configuration from NetworkConfig.to_dict; its architecture tells the family.

    Raises:
        UserError: The values are not a configuration of a known family.
    """
    known = {name: family for family in FAMILIES for name in family.config.architectures}
    name = values.get("architecture")
    if not isinstance(name, str) or name not in known:
        raise UserError(
            f"network: architecture={brief(name)} is not supported: use one of {', '.join(known)}"
        )
    return known[name].config.from_dict(values)


def config_of_pickle(pickled: PickledNetwork) -> NetworkConfig:
    """Return the configuration of a network in a pickle.

    Raises:
        UserError: Its class is of no known family, or its arguments are not supported.
    """
    for family in FAMILIES:
        if family.published == pickled.class_name:
            return family.from_pickle(pickled)
    raise UserError(
        f"network: {brief(pickled.class_name)} is not a supported class of networks: give a file "
        f"with {' (EDM) or '.join(family.published for family in FAMILIES)} (EDM2)"
    )
