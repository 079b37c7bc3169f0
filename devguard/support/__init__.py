"""Tools for Python and torch: call sites, patches, notices, the accelerator. Independent of owners.

May import only devguard.errors.
"""
