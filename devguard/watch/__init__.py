"""Which process is on which GPU: live for ``devguard watch``, afterwards for ``devguard report``, and as metrics.

Two views are joined: what each guarded process writes to its log folder (folder.py), and what the driver, or the
simulation, says of each GPU (gpus.py). The result is a matrix of processes and GPUs with a verdict for each cell
(matrix.py). Needs no torch, and opens no context.
"""
