"""A slice of Cloud TPU from gcloud: what is asked of it, and in which order."""
