"""Tests of a mechanism on its own: an arm is a rule or an untrained layer, and `measure(arm, seed)` takes seconds at most."""
