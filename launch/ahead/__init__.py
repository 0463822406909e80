"""Compiling ahead of time for devices that are not here; `launch.compile` is the command."""

STEPS = ("train", "wake", "sleep")
