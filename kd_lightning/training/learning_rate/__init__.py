"""Learning-rate schedules: lengths that follow the run, what of them does not fit it, and the metrics they watch."""
