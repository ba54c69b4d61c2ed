"""What `pip install` puts on the path; the files in tools/ call the same functions."""
