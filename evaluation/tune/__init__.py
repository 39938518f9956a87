"""Which steps to compute, chosen for one model: `accel tune`."""
