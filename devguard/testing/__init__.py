"""The rest of the pytest plugin, loaded once an option is given: guards each test and reports its strays.

A run without the options imports only `declared` from here (devguard/pytest_plugin.py). Needs pytest 8 or newer.
"""
