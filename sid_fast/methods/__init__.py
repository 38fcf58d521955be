"""Training methods, one file each: networks, phases, inputs and losses."""
