"""The YAML file of a run as one typed value, and errors that name its file, line and key."""
