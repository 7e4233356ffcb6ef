"""Fair comparison at equal budget, the runner of claims, and the evidence they leave."""
