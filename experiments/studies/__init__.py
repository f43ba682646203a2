"""Studies compare many runs, where an experiment looks into one."""

STUDIES = ("hard_sparsity", "convergence", "stability")
