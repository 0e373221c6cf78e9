"""What a person watches while a run goes on, and where it is written."""
