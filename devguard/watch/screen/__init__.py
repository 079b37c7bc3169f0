"""The matrix on a terminal: the live screen (live.py), and the lines that it and ``--once`` show (table.py)."""
