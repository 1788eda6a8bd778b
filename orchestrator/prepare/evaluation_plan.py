"""Which model is evaluated, and how its tokens and layers are divided."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from orchestrator.rundir.layout import EVALUATION_TOKENS
from planners.batching import TokenBatching
from planners.plan import StagePlan

EXACT = "float32"  # in which losses are measured, unless those in the model's own dtype agree
TRIAL_SEQUENCES = 2  # on which they are compared


def exact_dtype(device: str, stored: str) -> str:
    """Return the dtype in which tokens are calibrated, if the recipe does not say.

    On a CPU float32 is exact and fast; on an accelerator models are served in their own dtype.
    """
    return EXACT if device == "cpu" else stored


def own_dtype(device: str, stored: str) -> str:
    """Return a narrower dtype in which losses may be measured faster; empty if there is none."""
    return "" if device == "cpu" or stored == EXACT else stored


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model that is evaluated.

    Attributes:
        name: ``dense`` or ``compressed``.
        uri: its checkpoint.
        identity: fingerprint of what determines its weights.
        contents: hashes that workers compare with what they read; empty for a result, whose
            hashes are in its records.
        model_store: a directory that links in the checkpoint may point into, or empty.
    """

    name: str
    uri: str
    identity: str
    contents: Mapping[str, str] = field(default_factory=dict)
    model_store: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationPlan:
    """What a model is evaluated on, and how the work is divided.

    Attributes:
        family: names its tensors.
        waves: stages and waves.
        chains: copies of the stages of a wave, each for a share of the parts.
        batching: of the evaluation tokens; a microbatch is a part.
        tokens_hash: of the evaluation tokens.
        threads: of one unit.
        device: class of device.
        own_dtype: of the model, in which losses are measured if that makes no difference to them;
            empty if that is not a question.
        tokens: the file in the run directory that holds the tokens.
        first: sequence of that file with which they begin.
    """

    family: str
    waves: tuple[tuple[StagePlan, ...], ...]
    batching: TokenBatching
    tokens_hash: str
    threads: int
    device: str
    chains: int = 1
    own_dtype: str = ""
    tokens: str = EVALUATION_TOKENS
    first: int = 0

    @property
    def num_workers(self) -> int:
        """Workers that the widest wave uses."""
        return self.chains * max(map(len, self.waves))
