"""Tasks on real data that every machine has."""
