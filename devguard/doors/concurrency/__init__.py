"""A thread or a process starts: on which device, and under which rules.

May import doors.first_use, doors.table, reporting and the floors below; no other family of doors.
"""
