"""Does the planner's cost model predict what a machine does? `python -m benchmarks.planner_check`."""
