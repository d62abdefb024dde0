"""Image metrics and the comparison of recovery methods on one measurement problem."""
