"""Which device is owned, by which process, thread or scope: owners, the stack of scopes, and the rules in force.

May import support and modes.
"""
