"""The explorer: what explore.py serves, a page and the calls that it makes."""
