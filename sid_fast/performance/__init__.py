"""How a step runs fast, one optimisation a file."""
