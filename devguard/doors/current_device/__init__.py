"""A call means the current device, and the current device is not the owner's.

May import doors.first_use, doors.table, reporting and the floors below; no other family of doors.
"""
