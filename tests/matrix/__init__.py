"""The table of all classes of strays: ``python -m tests.matrix`` runs each class live on simulated GPUs."""
