"""`launch.benchmark`: suites that time every part, and peers that run beside ours."""
