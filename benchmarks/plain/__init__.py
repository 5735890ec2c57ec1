"""Networks of ours written the way of their papers' code, with our weights: what the comparisons compare with."""
