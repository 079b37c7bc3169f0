"""The scopes: `guard`, `remap`, `unguarded`, `no_strays`, as context managers and as decorators.

May import doors and the floors below it.
"""
