"""Ratios of devguard against torch's own ways; ``python -m benchmarks`` prints them all."""
