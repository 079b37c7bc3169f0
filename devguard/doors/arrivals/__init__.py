"""Data arrives with the name of another device: pickles, files, archives, shared memory, other libraries.

May import doors.first_use, doors.table, reporting and the floors below; no other family of doors.
"""
