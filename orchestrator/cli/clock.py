"""When this command began: what a person waited for includes the start of Python."""

import os
import time
from pathlib import Path

_IMPORTED = time.time()
_STAT = Path("/proc/self/stat")
_START = 19  # of the fields behind the name of the process: its start, in ticks since the boot


def began() -> float:
    """Return when this process started, in seconds since the epoch.

    Where the system does not say so it is when this module was imported.
    """
    if not _STAT.exists():
        return _IMPORTED
    # The name may contain blanks and brackets.
    fields = _STAT.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    since_boot = int(fields[_START]) / os.sysconf("SC_CLK_TCK")
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + since_boot
