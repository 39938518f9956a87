"""What a model family looks like to accel: one small adapter module each, imported when needed."""
