"""Machines and prices of a forecast."""

import re
from dataclasses import dataclass

from planners.errors import ConfigError

GB = 10**9  # vendors count device memory in these
RESERVED = 0.9  # of a device's memory is a worker's; the rest is the driver's and the allocator's


@dataclass(frozen=True, slots=True, kw_only=True)
class Pricing:
    """What workers cost and how long they last; neither changes what is computed.

    Attributes:
        price_per_hour: of one worker; None if not given.
        preemptions_per_hour: expected preemptions of one worker.
        measure: time a layer on this machine first.
    """

    price_per_hour: float | None = None
    preemptions_per_hour: float = 0.0
    measure: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Devices:
    """The devices of a cluster.

    Attributes:
        count: devices, one worker each.
        name: as given.
        bytes: usable memory of each.
    """

    count: int
    name: str
    bytes: int


def parse_cluster(text: str) -> Devices:
    """Return the devices of a text such as ``8xA100-80GB``.

    Raises:
        ConfigError: the text is not of that form.
    """
    match = re.fullmatch(r"(\d+)x([A-Za-z0-9]+(?:-[A-Za-z0-9]+)*?)-(\d+)GB", text)
    if match is None or int(match[1]) < 1 or int(match[3]) < 1:
        raise ConfigError(f"--cluster {text}: must be COUNTxNAME-MEMORYGB, such as 8xA100-80GB")
    return Devices(count=int(match[1]), name=match[2], bytes=int(int(match[3]) * GB * RESERVED))
