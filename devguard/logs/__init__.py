"""Reading log folders: the logs of many processes, merged, selected, printed, and compared with a baseline.

What writes them is `devguard.reporting`. Nothing here imports torch, and nothing that a file holds is trusted.
"""
