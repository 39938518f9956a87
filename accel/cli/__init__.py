"""The command line: one file a command, `common.py` for what they share, `app.py` for what ties them together."""
