"""`launch.doctor`: check software, devices, folders and the processes of a launch."""
