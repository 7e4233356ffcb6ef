"""The benchmark runner: what is measured, and beside what."""
