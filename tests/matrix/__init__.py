"""The table of all classes of strays: ``python -m tests.matrix`` runs each one live on simulated GPUs."""
