"""The parts of the training script for the bundled reference model (see ``tools/train_reference.py``)."""
