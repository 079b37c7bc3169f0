"""What the pytest plugin does once an option asks for it: guard each test, and tell what it did where.

Nothing here is imported by a run without the options (devguard/pytest_plugin.py). It needs pytest 8 or newer.
"""
