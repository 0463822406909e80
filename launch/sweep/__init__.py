"""Many runs over the fields of one config: which, and how they are brought to their end."""
