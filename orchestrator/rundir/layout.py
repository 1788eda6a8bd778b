"""Names of files and folders in a run directory."""

SPENT = ("model", "basis", "boundary", "draft", "partial", "refit")
KEPT = ("stats", "tokens")  # with keep_statistics

CALIBRATION_TOKENS = "tokens/calibration.parquet"

EVALUATION_TOKENS = "tokens/evaluation.parquet"
DROPPED = (
    "stats/",
    "basis/",
    "boundary/",
    "refit/",
    "draft/",
    "shards/",
)  # gone once a run is READY

READY = "READY"
REPORT = "report.json"
JOB = "job.json"  # which job of which cluster works on it; see `orchestrator.remote.submission`
STITCH = "stitch"  # the unit of index, config and tokenizer
