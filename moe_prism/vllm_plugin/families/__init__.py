"""One thin class per family of models, each in its own file: importing one imports that family of vLLM's only."""
