"""`python -m accel`, which is how `accelerate launch -m accel evaluate run …` starts it."""

from accel.cli.app import main

main()
