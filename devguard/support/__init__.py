"""What devguard needs of Python and torch: call sites, patches, notices, the accelerator. Knows no owner.

May import only devguard.errors.
"""
