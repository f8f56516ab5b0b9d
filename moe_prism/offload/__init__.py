"""A model larger than memory: sub-experts live in a block file on disk, a cache of them in memory."""

from .cache import BlockCache
from .deadline import set_deadline
from .eviction import EVICTION
from .load import load_offloaded
from .manager import Manager
from .pack import pack_checkpoint
from .statistics import Statistics
from .stored import set_stored

__all__ = [
    "EVICTION",
    "BlockCache",
    "Manager",
    "Statistics",
    "load_offloaded",
    "pack_checkpoint",
    "set_deadline",
    "set_stored",
]
