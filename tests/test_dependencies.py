"""No dependency has a weakness that is publicly known, where that can be asked."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.nightly  # its answer changes with a database, not with the code
OURS = "compress-cluster"


def test_no_dependency_has_a_known_weakness():
    command = [sys.executable, "-m", "pip_audit", "--format", "json", "--progress-spinner", "off"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        found = json.loads(done.stdout)["dependencies"]
    except (subprocess.TimeoutExpired, ValueError, LookupError) as error:
        pytest.skip(f"the database of weaknesses cannot be reached: {type(error).__name__}")
    others = [each for each in found if each["name"] != OURS]
    audited = [each for each in others if "skip_reason" not in each]
    if not audited:
        reason = others[0]["skip_reason"] if others else "no dependency was looked at"
        pytest.skip(f"the database of weaknesses cannot be reached: {reason}")
    weak = {each["name"]: [v["id"] for v in each["vulns"]] for each in audited if each["vulns"]}
    assert not weak
