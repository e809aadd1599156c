"""What passes between stages: results with a manifest, importance scores, depth scans, pruning plans; their names."""

from nemo_minitron.artifacts.fingerprints import fingerprint, sampled_fingerprint
from nemo_minitron.artifacts.manifest import (
    MANIFEST,
    MANIFEST_LIMIT,
    PARTIAL_KEY,
    Manifest,
    json_text,
    manifest_beside,
    plain,
    replace_file,
    versions,
    write_json,
)
from nemo_minitron.artifacts.scores import DepthScan, ImportanceScores, PruningPlan, TensorFile, save_tensors

__all__ = [
    "TensorFile",
    "save_tensors",
    "MANIFEST",
    "MANIFEST_LIMIT",
    "PARTIAL_KEY",
    "DepthScan",
    "ImportanceScores",
    "Manifest",
    "PruningPlan",
    "fingerprint",
    "json_text",
    "manifest_beside",
    "plain",
    "replace_file",
    "sampled_fingerprint",
    "versions",
    "write_json",
]
