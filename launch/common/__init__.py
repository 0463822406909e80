"""What several programs share: flags, devices, signals, prompts and what they print."""
