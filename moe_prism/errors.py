"""The exceptions that mean "the input is at fault": the command line prints them and exits with code 2.

Knows nothing of what raised them. A message names the value, the allowed range and the way out.
"""

from __future__ import annotations


class PrismError(ValueError):
    """Bad input: an impossible value, an unusable file, an unsupported model."""


class CheckpointError(PrismError):
    """A directory that is not a (whole, unaltered, readable) elastic checkpoint."""


class UnsupportedModelError(PrismError):
    """A model without routed experts, or of a family whose experts cannot be split."""
