"""The matrix as metrics for Prometheus: names (families.py), values (collector.py) and the HTTP server (server.py)."""
