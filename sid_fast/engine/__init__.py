"""How a step runs: device, processes, optimiser, checkpoints and the loop around it."""
