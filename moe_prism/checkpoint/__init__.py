"""The elastic checkpoint on disk: schema, read, write, checksums, restore, model card.

Importing it is cheap: torch and transformers are imported by the functions that need them.
"""

from .atomic import check_disk_space, check_output
from .card import model_card
from .inspect import describe
from .read import ElasticCheckpoint, open_checkpoint
from .restore import restore_checkpoint
from .schema import (
    SCHEMA_VERSION,
    BaselinePoint,
    Calibration,
    DistinctStable,
    ElasticConfig,
    OperatingPoint,
    OperatingPoints,
    permutation_key,
)
from .write import update_checkpoint, write_checkpoint

__all__ = [
    "SCHEMA_VERSION",
    "BaselinePoint",
    "Calibration",
    "DistinctStable",
    "ElasticCheckpoint",
    "ElasticConfig",
    "OperatingPoint",
    "OperatingPoints",
    "check_disk_space",
    "check_output",
    "describe",
    "model_card",
    "open_checkpoint",
    "permutation_key",
    "restore_checkpoint",
    "update_checkpoint",
    "write_checkpoint",
]
