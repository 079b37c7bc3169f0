"""Test suites of other projects, run with and without devguard: ``python -m tests.others``."""
