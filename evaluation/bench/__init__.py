"""Comparisons with what people use today, in one run on one model: `accel bench`."""
