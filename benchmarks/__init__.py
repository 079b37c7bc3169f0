"""Ratios of devguard's time to torch's own; ``python -m benchmarks`` prints them all."""
