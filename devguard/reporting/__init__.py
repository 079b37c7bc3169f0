"""The handling of strays: the verdict, the journal, the allow-list and the log files.

May import ownership and the floors below it.
"""
