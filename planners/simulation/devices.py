"""Rates of known devices for forecasts without measurements: a share of their published peaks.

Every forecast made from these numbers is labelled as estimated. Peaks are from NVIDIA's data sheet
of each card (A10G: the sheet that AWS publishes; B200: one eighth of HGX B200), for dense products:
where a sheet gives a rate with sparsity, half of it.
"""

from dataclasses import dataclass

from planners.units.work import Work

# Shares of the published peak that the products of layers, and float64 products, reach in practice.
MATMUL_SHARE, FLOAT64_SHARE = 0.55, 0.5
EIGH_SHARE = 0.02  # of the float64 peak: little of an eigendecomposition is matrix products
TERA, GIGA = 1e12, 1e9
# Files and calls: the same for every device.
READ, WRITTEN, CALLS = 1.0 * GIGA, 0.4 * GIGA, 100.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """The published peak rates of a device.

    Attributes:
        name: as in ``8xA100-80GB``.
        half: peak of bfloat16 or float16 products, in 10^12 operations a second.
        single: likewise float32.
        double: likewise float64, with tensor cores if it has float64 ones.
        memory: bandwidth, in 10^12 bytes a second.
    """

    name: str
    half: float
    single: float
    double: float
    memory: float

    def rates(self, dtype: str) -> Work:
        """Return the rate of each kind of work, per second, with a forward pass in that dtype."""
        products = (self.single if dtype == "float32" else self.half) * TERA * MATMUL_SHARE
        double = self.double * TERA
        return Work(
            matmul=products,
            gram=products,
            float64=double * FLOAT64_SHARE,
            eigh=double * EIGH_SHARE,
            touched=self.memory * TERA * MATMUL_SHARE,
            read=READ,
            written=WRITTEN,
            calls=CALLS,
        )


DEVICES = {
    device.name: device
    for device in (
        Device(name="A100", half=312.0, single=19.5, double=19.5, memory=2.0),
        Device(name="A10G", half=70.0, single=35.0, double=0.55, memory=0.6),
        Device(name="B200", half=2250.0, single=75.0, double=37.0, memory=7.7),
        Device(name="H100", half=989.0, single=67.0, double=67.0, memory=3.35),
        Device(name="H200", half=989.0, single=67.0, double=67.0, memory=4.8),
        Device(name="L4", half=121.0, single=30.3, double=0.47, memory=0.3),
        Device(name="L40S", half=362.0, single=91.6, double=1.43, memory=0.864),
        Device(name="T4", half=65.0, single=8.1, double=0.25, memory=0.32),
    )
}


def cpu_rates(dtype: str, *, threads: int) -> Work:
    """Return the rates of ``threads`` threads of a server CPU with 256-bit vectors."""
    products = 60 * GIGA * threads
    return Work(
        matmul=products if dtype == "float32" else products / 2,
        gram=products,
        float64=30 * GIGA * threads,
        eigh=10 * GIGA * threads,
        touched=6 * GIGA * threads**0.5,
        read=READ,
        written=WRITTEN,
        calls=CALLS,
    )


def rates_of(name: str, dtype: str, *, threads: int = 1) -> Work | None:
    """Return the rates of a device by its name, ``CPU`` or one of `DEVICES`; None if unknown."""
    if name.upper() == "CPU":
        return cpu_rates(dtype, threads=threads)
    device = DEVICES.get(name.upper().partition("-")[0])
    return device.rates(dtype) if device else None
