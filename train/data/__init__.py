"""Data folders: the layouts that are known, a file for each task, and what a check of one finds."""
