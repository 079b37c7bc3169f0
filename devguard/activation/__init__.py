"""devguard for a whole process: install and uninstall, activation by environment, status.

May import doors and the floors below it.
"""
