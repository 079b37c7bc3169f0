"""The test suites of others, run with and without devguard in force: ``python -m tests.others``."""
