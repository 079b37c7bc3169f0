"""Contexts on GPUs that the process does not own, and indices that mean another physical GPU.

May import doors.first_use, doors.table, reporting and the floors below; no other family of doors.
"""
