"""The planner: which layout a model and a number of devices want, and what each rank of it holds."""
