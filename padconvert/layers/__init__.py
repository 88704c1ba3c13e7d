"""Partially dynamic layers. They know no model, no policy and no file."""
