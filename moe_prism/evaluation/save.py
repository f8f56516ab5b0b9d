"""Put measured operating points into the checkpoint that they are of: JSON, plot and model card.

Knows nothing of how they were measured.
"""

from __future__ import annotations

from ..checkpoint.card import model_card
from ..checkpoint.read import ElasticCheckpoint
from ..checkpoint.schema import CARD_FILE, OPERATING_POINTS_FILE, PLOT_FILE, OperatingPoints
from ..checkpoint.write import update_checkpoint
from .plot import frontier_png


def save_points(checkpoint: ElasticCheckpoint, points: OperatingPoints, base_model: str | None = None) -> None:
    """Replace operating points, frontier picture and card, and bring the checksums up to date."""
    card = model_card(
        name=checkpoint.path.resolve().name,
        elastic=checkpoint.elastic,
        recipe_yaml=checkpoint.recipe(),
        operating_points=points,
        base_model=base_model,
        has_plot=True,
    )
    files = {
        OPERATING_POINTS_FILE: points.to_json().encode(),
        PLOT_FILE: frontier_png(points),
        CARD_FILE: card.encode(),
    }
    update_checkpoint(checkpoint.path, files)
