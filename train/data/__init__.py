"""Data folders: the known layouts, with a file for each task, and the reports of their checks."""
