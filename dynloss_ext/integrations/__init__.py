"""Callbacks for the trainers of other packages: `lightning` and `transformers`, each imported on demand."""
