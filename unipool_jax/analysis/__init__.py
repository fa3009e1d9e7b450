"""Analyses of the routing of a checkpoint, comparisons of runs, figures and reports."""
