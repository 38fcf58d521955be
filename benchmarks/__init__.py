"""What was measured: commands that measure it, and the result files they leave."""
