"""A CUDA context, or another physical GPU than the program assumes, is there.

May import doors.first_use, doors.table, reporting and the floors below; no other family of doors.
"""
