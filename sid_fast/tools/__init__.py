"""What looks at whole steps from outside: estimates, GPU figures, the micro-batch."""
