"""What people look at: routing analyses of one checkpoint, comparisons of runs, figures and reports."""
