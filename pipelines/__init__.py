"""What a model family looks like to accel: one small adapter module per family, imported when it is needed."""
