"""The command line: one file a command; `common.py` for what they share, `results.py` and `terminal.py` for what is
printed, `app.py` for what ties them together."""
