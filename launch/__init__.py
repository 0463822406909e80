"""Command-line programs: thin absl entry points over the library."""
