"""When things happen: the step, the loop, states, logs."""
