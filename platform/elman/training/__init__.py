"""Assembly: one configuration, trained, tested and recorded."""
