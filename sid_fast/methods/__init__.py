"""What is trained, one file a method: networks, phases, inputs and losses, and nothing else."""
